"""`verify`: is every file of a set or a run what was written? Each is read once, whole; nothing is changed.

A file's checksum is its own (seals, arrows, parquet), or stands in another: a tar's in the manifest of its index and in the
download's stats, a checkpoint's files in its state.json, features in their meta.json.
"""

import json
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import parquet
from pipeline.arrows import ArrowFile
from pipeline.console import InputError, existing
from pipeline.files import sha256_of
from pipeline.index import INDEX_NAME, MANIFEST_NAME, PREVIOUS_NAME
from pipeline.processes import cores
from pipeline.progress import Meter
from pipeline.scans import SCANS_NAME
from pipeline.seals import UNREADABLE, Damaged, has_trailer, is_sealed, open_json, read_lines, without_trailer

_STATS = "_stats.json"


@dataclass(frozen=True)
class Fault:
    """A file that is not what was written."""

    path: Path
    found: str
    cure: str


@dataclass
class Verified:
    """What was read, what was found, and the files without a checksum, by what gives them one."""

    files: int = 0
    size: int = 0
    faults: list[Fault] = field(default_factory=list)
    unsealed: defaultdict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class _Told:
    """What a file says of another: its sha256, and the cure where it has another."""

    by: Path
    sha256: str
    cure: str


def _json(path: Path) -> bool:
    text = path.read_bytes()
    if not is_sealed(text.removesuffix(b"\n")):
        json.loads(text)
        return False
    open_json(text)
    return True


def _lines(path: Path) -> bool:
    for _ in read_lines(path, "see it"):
        pass
    with path.open("rb") as file:
        return not (line := file.readline()) or is_sealed(line.removesuffix(b"\n"))


def _arrow(path: Path) -> bool:
    file = ArrowFile(path)
    file.check_all()
    if not file.sealed:
        for number in range(file.batches):
            file.batch(number)
    return file.sealed


def _parquet(path: Path) -> bool:
    file, sealed = parquet.read(path)
    for _ in () if sealed else file.iter_batches():
        pass
    return sealed


def _trailer(path: Path) -> bool:
    data = path.read_bytes()
    if sealed := has_trailer(data):
        without_trailer(data)
    elif path.suffix == ".npz":
        with zipfile.ZipFile(path) as file:
            if name := file.testzip():
                raise Damaged(f"{name} does not match its checksum")
    return sealed


_CHECKS: dict[str, Callable[[Path], bool]] = {".json": _json, ".jsonl": _lines, ".arrow": _arrow, ".parquet": _parquet,
                                              ".npy": _trailer, ".npz": _trailer}


def _cure(path: Path) -> str:
    """How to have a damaged file again that nothing else tells of."""
    folder = path.parent.parent if path.parent.name == SCANS_NAME else path.parent
    if path.name in (INDEX_NAME, MANIFEST_NAME, PREVIOUS_NAME) or path.parent.name == SCANS_NAME:
        return f"`uniclip-data index {folder}` (a merged one: `merge`) makes it again"
    if path.name.endswith(_STATS):
        return f"delete {path.name.removesuffix(_STATS)}* there, run the download again, then index again"
    return {".jsonl": "remove the line", ".npz": "measure the set again"}.get(
        path.suffix, "put a copy back, or make it again with the command that wrote it")


def _sums(path: Path, told: dict[str, Any]) -> Iterator[tuple[Path, _Told]]:
    """The checksums of other files that a JSON file holds."""
    if path.name.endswith(_STATS):
        stem = path.name.removesuffix(_STATS)
        for suffix, sha256 in _dict(told.get("sha256")).items():
            yield path.with_name(stem + suffix), _Told(path, sha256, _cure(path))
    elif path.name == MANIFEST_NAME and isinstance(told.get("shards"), list):
        for shard in told["shards"]:
            tar = Path(os.path.normpath(path.parent / shard["name"]))
            yield tar, _Told(path, shard["sha256"], f"put a copy back; to take it as it is: `touch` it, then `uniclip-data "
                             f"index {tar.parent}`")
    else:
        cure = "resume from another checkpoint" if path.name == "state.json" else "delete the folder: it is computed again"
        for name, sha256 in _dict(told.get("hashes" if path.name == "state.json" else "sha256")).items():
            yield path.with_name(name), _Told(path, sha256, cure)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _against(path: Path, told: list[_Told], root: Path) -> Iterator[Fault]:
    """A file that others tell of; of several that agree, the first one speaks."""
    if not path.is_file():
        yield Fault(path, f"is missing, {_short(told[0].by, root)} tells of it", told[0].cure)
        return
    try:
        found = sha256_of(path)
    except OSError as error:
        yield Fault(path, f"cannot be read: {error.strerror or error}", told[0].cure)
        return
    wrong = [one for one in told if one.sha256 != found]
    if wrong:
        yield Fault(path, f"is not what it was: another sha256 than in {' and '.join(_short(one.by, root) for one in wrong)}",
                    wrong[0].cure)


def _short(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _own(path: Path) -> tuple[bool, list[Fault]]:
    """Whether a file has a checksum of its own, and what is wrong with it."""
    try:
        return _CHECKS[path.suffix](path), []
    except (*UNREADABLE, RecursionError, zipfile.BadZipFile, NotImplementedError) as error:
        what = str(error).removeprefix(f"{path}, ").removesuffix(": see it")
        return True, [Fault(path, f"is damaged: {what}", _cure(path))]


def _files(root: Path) -> list[Path]:
    """Of a folder what may have a checksum; not what is half written."""
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix in {*_CHECKS, ".tar"}
                  and not any(part == "_tmp" or part.endswith((".tmp", ".partial")) for part in path.relative_to(root).parts))


def verify(root: Path, workers: int | None = None) -> Verified:
    """Read everything. Raises InputError where there is nothing to verify."""
    if not existing(root, "the folder").is_dir() or not (files := _files(root)):
        raise InputError(f"{root} holds nothing to verify: give the folder of a download, an index or a run")
    done, told = Verified(), defaultdict(list)
    for path in (path for path in files if path.suffix == ".json"):
        try:
            sums = list(_sums(path, open_json(path.read_bytes())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # it is found damaged below, or is not ours
        for other, one in sums:
            told[other].append(one)
    todo = [*told, *(path for path in files if path not in told)]

    def work(path: Path) -> tuple[Path, bool, list[Fault]]:
        if path in told:
            return path, True, list(_against(path, told[path], root))
        sealed, faults = (False, []) if path.suffix == ".tar" else _own(path)
        return path, sealed, faults

    with Meter("verifying", len(todo)) as meter, ThreadPoolExecutor(workers or cores()) as pool:
        for path, sealed, faults in pool.map(work, todo):
            done.files, done.size = done.files + 1, done.size + (path.stat().st_size if path.is_file() else 0)
            done.faults += faults
            if not sealed:
                done.unsealed[_gives(path)].append(path)
            meter.at(done.files, f"{done.size / 1e9:,.1f} GB, {len(done.faults):,} damaged")
    return done


def _gives(path: Path) -> str:
    """What gives a checksum to a file that has none."""
    if path.suffix == ".tar" or path.name in (INDEX_NAME, MANIFEST_NAME) or path.parent.name == SCANS_NAME:
        return "`uniclip-data index` gives them one (a merged index: `merge`)"
    return "an older version or another program wrote them; whoever writes them again gives them one"
