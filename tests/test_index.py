"""Any WebDataset tars become an index that says what webdataset itself reads, and counts what it leaves out."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import command, encoded, picture
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

import pipeline.files
import pipeline.index
import pipeline.indexing
import pipeline.scans
from pipeline import arrows
from pipeline.console import InputError, WorkFailed
from pipeline.index import Index
from pipeline.indexing import build
from pipeline.samples import groups
from pipeline.schema import INDEX, sample_id_of
from pipeline.tars import scan

JPEG = [encoded(picture(seed), quality=90) for seed in range(8)]


def write_tar(path: Path, members: list[tuple[str, bytes | str | dict]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def quarantine(folder: Path) -> list[tuple[str, str, str]]:
    lines = map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())
    return [(line["shard"], line["key"], line["reason"]) for line in lines]


def classes(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(key, class of the reason)."""
    return [(key, reason.partition(":")[0]) for key, reason in found]


def groups_of(path: Path) -> list:
    with path.open("rb") as file:
        return list(groups(file))


def image_bytes(index: Index, row: int) -> bytes:
    at = {name: values[0] for name, values in index.columns(np.array([row])).items()}
    with (index.folder / index.shards[at["shard"]]).open("rb") as file:
        file.seek(at["offset"])
        return file.read(at["size"])


def test_unusable_samples_are_excluded_named_and_counted(tmp_path):
    write_tar(tmp_path / "a.tar", [
        ("good.jpg", JPEG[0]), ("good.txt", "\ufefffine"),
        ("html.jpg", b"<html>"), ("html.txt", "x"),
        ("broken.jpg", encoded(picture(1, 300, 300))[:2000]), ("broken.txt", "x"),
        ("silent.jpg", JPEG[1]), ("blank.jpg", JPEG[2]), ("blank.txt", "  "),
        ("entity.jpg", JPEG[1]), ("entity.txt", "&nbsp;\u200b"), ("book.jpg", JPEG[2]), ("book.txt", "word " * 200_001),
        ("blind.txt", "x"), ("latin.jpg", JPEG[3]), ("latin.txt", b"\xff\xfe"),
        ("good.jpg", JPEG[4]), ("good.txt", "again"), ("also.jpg", JPEG[5]), ("also.txt", "x"),
        ("also.jpg", JPEG[6]), ("also.txt", "y"), ("k\udcff.jpg", JPEG[7])])
    manifest = build(tmp_path, 1)
    assert classes([(key, reason) for _, key, reason in quarantine(tmp_path)]) == [
        ("html", "not an image"), ("broken", "broken image"), ("silent", "no caption"), ("blank", "no caption"),
        ("entity", "no caption"), ("book", "captions too long"),
        ("blind", "no image"), ("latin", "caption is not UTF-8"), ("good", "duplicate key"), ("also", "duplicate key"),
        ("k\udcff", "key is not UTF-8")]
    assert manifest["counts"]["samples"] == 2
    assert sum(manifest["counts"]["excluded"].values()) == 11
    index = Index.open(tmp_path)
    assert [(index.key(row), index.captions(row), image_bytes(index, row)) for row in range(2)] == [
        ("also", ["x"], JPEG[5]), ("good", ["fine"], JPEG[0])]


def _torn(tmp_path: Path, cut: int) -> Path:
    """Three samples; the last 10,240 bytes are padding and end mark, of which `cut` are missing and what comes before."""
    path = write_tar(tmp_path / "t.tar", [(f"{i}.{suffix}", data) for i in range(3) for suffix, data in
                                          (("txt", "x"), ("jpg", JPEG[i]))])
    path.write_bytes(path.read_bytes()[:cut])
    return path


def test_a_truncated_tar_gives_what_is_whole(tmp_path):
    whole = scan(_torn(tmp_path, 10**9))
    assert (whole.rows.num_rows, whole.unusable) == (3, [])
    images = [group.members["jpg"] for group in groups_of(tmp_path / "t.tar")]
    starts, ends = [offset for offset, _ in images], [offset + -(-size // 512) * 512 for offset, size in images]
    for cut, rows, unusable in [
        (starts[2] + 100, 2, [("2", "truncated tar")]),   # inside the last image
        (starts[2] - 300, 2, [("2", "no image"), ("", "truncated tar")]),  # inside its header
        (ends[1], 2, [("", "truncated tar")]),            # between two samples, end mark missing
        (300, 0, [("", "not a tar")]), (0, 0, [("", "not a tar")]),
    ]:
        found = scan(_torn(tmp_path, cut))
        assert (found.rows.num_rows, classes(found.unusable)) == (rows, unusable), cut


def test_a_torn_header_in_the_middle_is_noticed(tmp_path):
    """tarfile itself stops there without a word."""
    path = _torn(tmp_path, 10**9)
    second = next(group for group in groups_of(path) if group.key == "1").members["txt"][0] - 512
    data = bytearray(path.read_bytes())
    data[second:second + 512] = b"garbage!" * 64
    path.write_bytes(data)
    reason = f"damaged tar: no header where the next member should begin, at byte {second:,}; the rest is not read"
    assert scan(path).unusable == [("", reason)]
    assert scan(path).rows["key"].to_pylist() == ["0"]


def test_captions_and_ids_come_from_the_best_place(tmp_path):
    url, other = "http://h/x.jpg", "http://h/y.jpg"
    most = {"captions": ["one", " two ", "", "one"], "caption": "no", "sample_id": 77, "url": other, "source": "web"}
    write_tar(tmp_path / "a.tar", [
        ("0.jpg", JPEG[0]), ("0.json", most), ("0.txt", "no"),
        ("1.jpeg", JPEG[1]), ("1.json", {"captions": [], "caption": "from json", "url": url}), ("1.txt", "no"),
        ("2.PNG", encoded(picture(2), "PNG")), ("2.txt", "from txt\n"),
        ("3.webp", encoded(picture(3), "WEBP")), ("3.json", "not json"), ("3.txt", "despite the json")])
    build(tmp_path)
    index = Index.open(tmp_path)
    assert [index.captions(row) for row in range(4)] == [["one", "two"], ["from json"], ["from txt"], ["despite the json"]]
    assert index.columns(np.arange(4))["sample_id"].tolist() == [
        sample_id_of(other), sample_id_of(url), sample_id_of(encoded(picture(2), "PNG")),
        sample_id_of(encoded(picture(3), "WEBP"))]
    assert [index.source(row) for row in range(4)] == ["web", "", "", ""]
    assert index.columns(np.arange(4))["plain"].tolist() == [True, True, False, False]


def test_width_and_height_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(0), exif=exif)
    write_tar(tmp_path / "a.tar", [("0.jpg", turned), ("0.txt", "x"), ("1.jpg", JPEG[1]), ("1.txt", "x")])
    build(tmp_path)
    found = Index.open(tmp_path).columns(np.arange(2))
    assert list(zip(found["width"], found["height"], found["plain"], strict=True)) == [(60, 80, False), (80, 60, True)]


def test_equal_ids_unite_across_shards(tmp_path):
    def sample(key: str, seed: int, caption: str) -> list:
        return [(f"{key}.jpg", JPEG[seed]), (f"{key}.txt", caption)]

    write_tar(tmp_path / "b.tar", sample("0", 1, "second") + sample("1", 2, "alone"))
    write_tar(tmp_path / "a.tar", sample("9", 1, "first") + sample("8", 1, "earlier key") + sample("7", 3, "other"))
    write_tar(tmp_path / "c.tar", sample("0", 1, "first") + sample("1", 1, "third"))
    manifest = build(tmp_path)
    index = Index.open(tmp_path)
    assert manifest["counts"] == {"samples": 3, "merged": 4, "excluded": {}}
    assert [(index.key(row), index.captions(row)) for row in range(3)] == [
        ("7", ["other"]), ("8", ["earlier key", "first", "second", "third"]), ("1", ["alone"])]
    assert index.shards == ["a.tar", "b.tar", "c.tar"]
    assert index.shard_starts.tolist() == [0, 2, 3, 3]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Forty-one samples in four tars, one of them empty, one in a sub-folder; not indexed."""
    folder = tmp_path_factory.mktemp("wide")
    number = 0
    for name, count in (("b.tar", 20), ("a/x.tar", 13), ("a.tar", 0), ("c.tar", 8)):
        members = []
        for i in reversed(range(count)):
            told = {"url": f"http://h/{name}/{i}", "caption": f"ü {name} {i}", "source": name}
            members += [(f"{i:03}.jpg", JPEG[number % 8]), (f"{i:03}.json", told)]
            number += 1
        write_tar(folder / name, members)
    for hidden in ("_tmp/1/c.tar", ".index.1/d.tar"):
        write_tar(folder / hidden, [("0.jpg", JPEG[0]), ("0.txt", "unfinished work")])
    return folder


def test_batches_change_nothing_and_lookups_agree_with_arrow(wide, monkeypatch):
    fingerprint = build(wide, 2)["fingerprint"]
    one = pa.ipc.open_file(wide / "index.arrow").read_all().to_pylist()
    for module in (pipeline.index, pipeline.indexing):
        monkeypatch.setattr(module, "INDEX_BATCH_ROWS", 9)
    manifest = build(wide, 1)
    index = Index.open(wide / "index.arrow")
    expected = pa.ipc.open_file(wide / "index.arrow").read_all().to_pylist()
    assert expected == one
    assert [(row["shard"], row["key"]) for row in expected] == sorted((row["shard"], row["key"]) for row in expected)
    assert manifest["fingerprint"] == index.fingerprint == fingerprint
    assert len(index) == 41
    rows = np.random.default_rng(0).permutation(np.r_[np.arange(41), 5, 5])
    codes = {"shard": index.shards, "source": manifest["sources"]}
    for found_all in (index.columns(rows), pickle.loads(pickle.dumps(index)).columns(rows)):
        for name, found in found_all.items():
            values = [expected[row][name] for row in rows]
            assert found.tolist() == ([codes[name].index(value) for value in values] if name in codes else values), name
    assert [index.captions(row) for row in range(41)] == [row["captions"] for row in expected]
    assert [index.key(row) for row in range(41)] == [row["key"] for row in expected]
    assert [index.source(row) for row in range(41)] == [row["source"] for row in expected]
    assert index.columns(np.array([], np.int64))["offset"].shape == (0,)
    for bad in (-1, 41):
        with pytest.raises(IndexError):
            index.captions(bad)
        with pytest.raises(IndexError):
            index.columns(np.array([0, bad]))


def test_manifest_says_what_it_was_made_of(wide):
    manifest = build(wide, 2, "the command")
    assert [(shard["name"], shard["samples"]) for shard in manifest["shards"]] == [
        ("a.tar", 0), ("a/x.tar", 13), ("b.tar", 20), ("c.tar", 8)]
    for shard in manifest["shards"]:
        data = (wide / shard["name"]).read_bytes()
        assert (shard["size"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    told = json.loads((wide / "manifest.json").read_text())
    assert len(told.pop("crc32")) == 8
    assert manifest == told
    assert manifest["sources"] == ["a/x.tar", "b.tar", "c.tar"]
    assert manifest["created_by"]["command"] == "the command"


def test_the_fingerprint_follows_the_content(tmp_path):
    prints = set()
    for name, caption, seed in (("a.tar", "x", 0), ("a.tar", "y", 0), ("a.tar", "x", 1), ("b.tar", "x", 0)):
        for old in tmp_path.glob("*.tar"):
            old.unlink()
        write_tar(tmp_path / name, [("0.jpg", JPEG[seed]), ("0.txt", caption)])
        prints.add(build(tmp_path, 1)["fingerprint"])
    assert len(prints) == 4


def test_members_are_grouped_as_webdataset_does(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(name, b"x") for name in (
        "dir.x/000.jpg", "dir.x/000.txt", "dir.x/001.JPG", "a.b/c.d.seg.png", "a.b/c.txt", "plain", ".hidden.jpg",
        "./dot/1.jpg", "__meta__", "__info__/x.json", "z.jpg", "z.cls", "y.jpg", "z.json")])
    with path.open("rb") as file:
        theirs = [(sample["__key__"], {name for name in sample if not name.startswith("__")})
                  for sample in group_by_keys(tar_file_expander([{"url": "u", "stream": file}]))]
    assert [(group.key, set(group.members)) for group in groups_of(path) if group.members] == theirs


def test_reading_needs_neither_torch_nor_pillow(wide):
    program = f"import sys; from pipeline.index import Index; Index.open({str(wide)!r}).captions(0); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "PIL", "webdataset", "pandas"} & set(done.stdout.split())


def test_what_cannot_be_opened_is_named_with_its_cure(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.jpg", JPEG[0]), ("0.txt", "x"), ("1.jpg", JPEG[1]), ("1.txt", "x")])
    build(tmp_path, 1)
    arrow, manifest = (tmp_path / "index.arrow").read_bytes(), json.loads((tmp_path / "manifest.json").read_text())

    def refuses(says: str) -> None:
        with pytest.raises(InputError, match=says) as caught:
            Index.open(tmp_path)
        assert f"run `uniclip-data index {tmp_path}`" in str(caught.value)

    (tmp_path / "index.arrow").write_bytes(b"not arrow")
    refuses("cannot be read")
    (tmp_path / "index.arrow").write_bytes(arrow[:len(arrow) // 2])
    refuses("cannot be read")
    other = INDEX.with_metadata({"uniclip.schema": "index/9"})
    arrows.write(tmp_path / "index.arrow", other, pa.ipc.open_file(arrow).read_all().cast(other).to_batches())
    refuses("has schema index/9, this program reads index/1")
    (tmp_path / "index.arrow").write_bytes(arrow)
    del manifest["crc32"]
    for content, says in (({**manifest, "counts": {"samples": 3}}, "has 2 rows, its manifest.json says 3"), ({}, "schema"),
                          ([], "cannot be read"), ({**manifest, "schema_version": 2}, "schema")):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        refuses(says)
    (tmp_path / "manifest.json").unlink()
    refuses("manifest.json does not exist")


def test_nothing_usable_is_work_failed(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.jpg", b"<html>"), ("0.txt", "x")])
    with pytest.raises(WorkFailed, match="no usable sample in 1 tars; 1 × not an image"):
        build(tmp_path, 1)
    assert not (tmp_path / "manifest.json").exists()


def test_the_command(tmp_path, wide):
    done = command("uniclip-data", "index", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path} holds no .tar file" in done.stderr
    done = command("uniclip-data", "index", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    done = command("uniclip-data", "index", wide)
    assert done.returncode == 0, done.stderr
    assert "41  samples" in done.stdout


def test_a_source_that_names_no_source_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.indexing, "_MAX_SOURCES", 1)
    write_tar(tmp_path / "a.tar", [(f"{i}.{suffix}", content) for i in range(3) for suffix, content in (
        ("jpg", JPEG[i]), ("json", {"caption": "x", "source": f"http://page/{i}"}))])
    assert build(tmp_path, 1)["sources"] == [""]
    assert Index.open(tmp_path).source(2) == ""


@pytest.mark.parametrize("name", ["uniclip-checksums:.txt", "uniclip-checksums:{}\n"])
def test_a_member_named_like_a_mark_of_ours_is_indexed(tmp_path, name):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for member, data in (("a.jpg", encoded(picture(0))), ("a.txt", b"a cat"), (name, b"x")):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert build(tmp_path, 1)["counts"]["samples"] == 1
    assert build(tmp_path, 1)["counts"]["samples"] == 1 and Index.open(tmp_path).file.sealed


def test_a_scan_that_cannot_be_read_back_is_not_a_tar_that_changes(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    monkeypatch.setattr(pipeline.scans, "_fresh", lambda folder, names, workers: names)  # a disk that lost what was written
    with pytest.raises(InputError, match=r"\.scans/.*\.arrow cannot be read"):
        build(tmp_path, 1)


def test_hashes_that_another_machine_may_be_writing_are_not_swept(tmp_path):
    (tmp_path / ".scans").mkdir()
    scan_, old, new = (tmp_path / ".scans" / f".{name}.99999999.tmp" for name in ("0.arrow", "old.npy", "new.npy"))
    for path in (scan_, old, new):
        path.touch()
    os.utime(old, (0, 0))
    with pipeline.files.alone([tmp_path]):
        assert [path.exists() for path in (scan_, old, new)] == [False, False, True]
