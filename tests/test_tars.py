"""Random tars, by tarfile and by GNU tar: what becomes of every member, held against tarfile's own listing of them.

The model below knows what a tar holds from that listing alone. Index, stream and evaluation are held against it.
"""

import io
import os
import random
import shutil
import subprocess
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, picture
from webdataset.tariterators import base_plus_ext

from pipeline.console import InputError
from pipeline.evalsets import RETRIEVAL, EvalSet
from pipeline.members import Tar, shown
from pipeline.recipe import Cursor, Recipe
from pipeline.sampling import WEAK
from pipeline.stream import Stream, StreamLoader
from pipeline.tars import scan

PICTURES = {suffix: [encoded(picture(n, 16, 12), format) for n in range(4)]
            for suffix, format in (("jpg", "JPEG"), ("JPG", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))}
ALL = tuple(picture for pictures in PICTURES.values() for picture in pictures)
FOLDERS = ["", "", "", "a/", "./", "v1.0/", "../", "/abs/", "deep/" * 30, "é/", "b\udcff/", "tab\t/", "new\nline/", "__MACOSX/"]
LOOSE = ["README", ".DS_Store", "._0.jpg", "a/._1.jpg", "__meta__", "__info__/x.json", "a/.hidden.txt", "0001"]
NONE = np.empty(0, np.int64)
GNU_TAR = shutil.which("tar")
BSDTAR = shutil.which("bsdtar")


def contents(rng: random.Random) -> list[tuple[str, bytes]]:
    """(name, bytes) of a few samples and of what else lies about, in the order of a tar."""
    made: list[tuple[str, bytes]] = []
    for number in range(rng.randrange(8)):
        key = rng.choice(FOLDERS) + rng.choice([f"{number:04}", f"{rng.randrange(3)}", f"n{number}" * 60, f"i-{number}"])
        suffix = rng.choice(list(PICTURES))
        members = [(f"{key}.{suffix}", rng.choice(PICTURES[suffix])), (f"{key}.txt", f"text {number}".encode())]
        if rng.random() < 0.2:
            members.append((f"{key}.npy", bytes(rng.randrange(2000))))
        if rng.random() < 0.2:  # dots in names
            members = [(f"{key}.{n}.{suffix}", rng.choice(PICTURES[suffix])) for n in range(rng.randrange(1, 5))]
        if rng.random() < 0.15:
            members.pop(rng.randrange(len(members)))
        if rng.random() < 0.1:
            members = [(name, b"<html>" if name.endswith(suffix) else data) for name, data in members]
        if rng.random() < 0.2:
            members.insert(rng.randrange(len(members) + 1), (rng.choice(LOOSE), b"x" * rng.randrange(1500)))
        made += rng.sample(members, len(members))
    if rng.random() < 0.1:
        rng.shuffle(made)
    return made


def by_tarfile(path: Path, rng: random.Random) -> None:
    """Any format; some members become links, pipes, devices and folders; now and then a second tar follows."""
    for mode in ["wb", *(["ab"] if rng.random() < 0.15 else [])]:
        format = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
        with path.open(mode) as file, tarfile.open(fileobj=file, mode="w", format=format) as tar:
            names: list[str] = []
            for name, data in contents(rng):
                if format == tarfile.USTAR_FORMAT and len(name.encode("utf-8", "surrogateescape")) > 99:
                    name = name[-40:]
                member, chance = tarfile.TarInfo(name), rng.random()
                member.size = len(data)
                if chance < 0.03 and names:
                    member.type, member.size, member.linkname = tarfile.LNKTYPE, 0, rng.choice(names)
                elif chance < 0.08:
                    member.type, member.size, member.linkname = rng.choice(
                        [(tarfile.SYMTYPE, 0, "some/where"), (tarfile.FIFOTYPE, 0, ""), (tarfile.CHRTYPE, 0, ""),
                         (tarfile.DIRTYPE, 0, ""), (b"7", len(data), ""), (b"Z", len(data), "")])
                if format == tarfile.PAX_FORMAT and rng.random() < 0.2:
                    member.pax_headers = {"comment": "x" * rng.randrange(1500), "SCHILY.xattr.user.x": "1 path=y\n"}
                names.append(name)
                tar.addfile(member, io.BytesIO(data))


def by_gnu_tar(path: Path, rng: random.Random) -> None:
    """From files on disk, some of them links to each other, some with holes."""
    root = path.with_suffix(".in")
    root.mkdir()
    for name, data in contents(rng):
        place = root / name.replace("../", "up/").lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        with_links = [one for one in root.rglob("*.*") if one.is_file()] if rng.random() < 0.1 else []
        place.unlink(missing_ok=True)
        if with_links:
            (os.link if rng.random() < 0.5 else os.symlink)(rng.choice(with_links), place)
        else:
            place.write_bytes(data)
            if rng.random() < 0.05:
                os.truncate(place, len(data) + 2**18)
    words = rng.choice([["--format=gnu", "--sparse"], ["--format=oldgnu", "--sparse"], ["--format=ustar"],
                        ["--format=posix", "--sparse"], ["--format=pax", "--sparse", "--sparse-version=0.1"],
                        ["--format=posix", "--sparse", "--sparse-version=0.0"], ["--format=gnu", "--label=a"],
                        ["--format=posix", "--hard-dereference"], ["--format=v7", "--dereference"]])
    subprocess.run(["tar", *words, "--sort=name", "-cf", path, "-C", root, "."],  # it leaves out what old formats cannot name
                   capture_output=True)
    shutil.rmtree(root)


def listing(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    """tarfile's own reading, beyond end marks too."""
    found = []
    with tarfile.open(path, "r:", ignore_zeros=True) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            member.name = member.pax_headers.get("GNU.sparse.name", member.name)  # tarfile takes the last of the two
            found.append((member, file.read() if file else b""))
    return found


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def expected(path: Path) -> tuple[dict[str, tuple[bytes, str]], Counter[str]]:
    """Usable key → (image, caption), and how many lines each other name has."""
    usable: dict[str, tuple[bytes, str]] = {}
    lines: Counter[str] = Counter()
    groups: list[tuple[str, dict[str, tuple[tarfile.TarInfo, bytes]]]] = []
    for member, data in listing(path):
        key, suffix = base_plus_ext(member.name)
        if member.isdir():
            continue
        if key is None or Path(member.name).name.startswith(".") or member.name.startswith(("__meta__", "__info__")):
            lines[shown(member.name)] += 1
            continue
        if not groups or groups[-1][0] != key or suffix.lower() in groups[-1][1]:
            groups.append((key, {}))
        groups[-1][1][suffix.lower()] = member, data
    for key, parts in groups:
        whole = all(member.isreg() and not member.issparse() for suffix, (member, _) in parts.items()
                    if suffix in {"jpg", "jpeg", "png", "webp", "txt"})
        image = next((parts[suffix][1] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in parts), b"<")
        text = parts["txt"][1] if "txt" in parts else b""
        proper = whole and image.startswith(ALL) and text.strip(b"\0") and is_text(text)
        if proper and "\udcff" not in key and key not in usable:
            usable[key] = image, text.decode().strip()
        else:
            lines[key] += 1
    return usable, lines


def indexed(path: Path) -> tuple[dict[str, tuple[bytes, str]], list[tuple[str, str]]]:
    shard, data = scan(path), path.read_bytes()
    return {row["key"]: (data[row["offset"]:row["offset"] + row["size"]], row["captions"][0])
            for row in shard.rows.to_pylist()}, shard.unusable


@pytest.fixture(scope="module")
def loader() -> Iterator[StreamLoader]:
    """One that is asked for passes only: its threads serve every tar."""
    recipe = Recipe((WEAK,), 16, "pillow", 1)
    made = StreamLoader(Stream(("x",), NONE, {}), lambda texts: NONE, recipe, Cursor(0, 0, "", ""), 1, "cpu", 0, 1, None)
    yield made
    made.close()


def streamed(path: Path, loader: StreamLoader) -> tuple[dict[str, tuple[bytes, str]], list[tuple[str, str]]]:
    faults: list[dict] = []
    loader._stream = Stream((str(path),), NONE, {})
    rows = {row["key"]: (row["image"], row["captions"][0]) for row in loader._pass(0, faults.append)}
    return rows, [(line["key"], line["reason"]) for line in faults]


def evaluated(path: Path) -> dict[str, tuple[bytes, str]] | None:
    """None where the set is refused."""
    try:
        return {key: (image, captions[0]) for key, image, captions in
                EvalSet("x", RETRIEVAL, "test", (), (), (path,), "").read(path)}
    except InputError as error:
        assert str(path) in str(error)
        return None


def check(path: Path, loader: StreamLoader) -> tuple[int, int]:
    """(members, usable samples) of one tar, all accounted for."""
    usable, lines = expected(path)
    found, unusable = indexed(path)
    assert found == usable
    assert Counter(key for key, _ in unusable) == lines
    assert all(reason not in {"", "no image", "no caption"} for _, reason in unusable)
    assert streamed(path, loader) == (found, unusable)
    told = [reason for key, reason in unusable if not (
        reason.startswith("no sample's file") and key.rpartition("/")[2].startswith("."))]  # passed over by evaluation
    whole = [reason for reason in told if reason not in {"not an image", "caption is not UTF-8", "key is not UTF-8"}]
    assert evaluated(path) is None or not whole
    if not unusable:  # of several images of a sample CLIP_benchmark takes another
        read = evaluated(path) or {}
        assert {key: text for key, (_, text) in read.items()} == {key: text for key, (_, text) in found.items()}
        assert all(image.startswith(ALL) for image, _ in read.values())
    return len(listing(path)), len(usable)


def names_by(program: str, path: Path) -> list[str]:
    ignore = "--ignore-zeros" if program == "tar" else "--options=read_concatenated_archives"
    words = [program, "-P", ignore, "--quoting-style=literal"] if program == "tar" else [program, "-P", ignore]
    done = subprocess.run([*words, "-tf", path], capture_output=True, check=True)
    return [line.rstrip("/") for line in done.stdout.decode("utf-8", "surrogateescape").split("\n")[:-1]]


def drill(folder: Path, loader: StreamLoader, tars: range, seed: int) -> tuple[int, int]:
    totals = np.zeros(2, int)
    for number in tars:
        rng, path = random.Random(f"{seed} {number}"), folder / f"{number}.tar"
        (by_gnu_tar if GNU_TAR and number % 5 == 0 else by_tarfile)(path, rng)
        try:
            totals += check(path, loader)
            if GNU_TAR and number % 10 == 0:
                with path.open("rb") as file:
                    ours = [member.name.rstrip("/") for member in Tar(file)]
                if not any("\n" in name for name in ours):
                    assert names_by("tar", path) == ours
        except Exception as error:
            error.add_note(f"tar {number} of seed {seed}")
            raise
        path.unlink()
    return int(totals[0]), int(totals[1])


def test_every_member_of_two_hundred_random_tars_is_accounted_for(tmp_path, loader):
    members, samples = drill(tmp_path, loader, range(200), 0)
    assert members > 1500
    assert samples > 200


@pytest.mark.slow
def test_every_member_of_ten_thousand_random_tars_is_accounted_for(tmp_path, loader, capsys):
    began = time.monotonic()
    members, samples = drill(tmp_path, loader, range(10_000), 1)
    with capsys.disabled():
        print(f"\n10,000 random tars: {members:,} members, {samples:,} samples, {time.monotonic() - began:.0f} s")
