"""Evaluation sets: what is written is CLIP_benchmark's layout to the byte, and every wrong layout is named."""

import io
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pipeline.console import InputError
from pipeline.evalsets import open_evalset, splits_of, write_evalset


def picture(colour: str, kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, kind)
    return stream.getvalue()


RED, BLUE, GREEN = picture("red"), picture("blue", "PNG"), picture("green", "WEBP")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    write_evalset(tmp_path / "colour", "test", [(RED, 0), (BLUE, 1), (GREEN, 2)], "classification",
                  ["red", "blue", "green"], ["a {c} thing", "{c}"], per_shard=2)
    return tmp_path / "colour"


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    write_evalset(tmp_path / "pairs", "test", [(RED, ["a red one", "rouge \n é"]), (BLUE, ["blue", ""])], "retrieval")
    return tmp_path / "pairs"


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        return {m.name: opened.extractfile(m).read() for m in opened}  # type: ignore[union-attr]


def rewrite(tar: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(tar, "w") as opened:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))


def test_classification_layout_to_the_byte(labelled: Path) -> None:
    files = {str(p.relative_to(labelled)) for p in labelled.rglob("*") if p.is_file()}
    assert files == {"dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt",
                     "test/nshards.txt", "test/0.tar", "test/1.tar"}
    assert (labelled / "classnames.txt").read_text() == "red\nblue\ngreen\n"
    assert (labelled / "test/nshards.txt").read_text() == "2\n"
    assert members(labelled / "test/0.tar") == {"s0000000.cls": b"0", "s0000000.jpg": RED,
                                                "s0000001.cls": b"1", "s0000001.png": BLUE}
    assert members(labelled / "test/1.tar") == {"s0000002.cls": b"2", "s0000002.webp": GREEN}


def test_captions_are_joined_by_newline_and_hold_none_themselves(captioned: Path) -> None:
    assert (captioned / "dataset_type.txt").read_text() == "retrieval\n"
    assert members(captioned / "test/0.tar")["s0000000.txt"] == "a red one\nrouge é".encode()
    assert members(captioned / "test/0.tar")["s0000001.txt"] == b"blue"


def test_what_is_written_is_read_back(labelled: Path, captioned: Path) -> None:
    read = open_evalset(labelled)
    assert list(read.examples()) == [("s0000000", RED, 0), ("s0000001", BLUE, 1), ("s0000002", GREEN, 2)]
    assert (read.name, read.kind, read.classnames) == ("colour", "classification", ("red", "blue", "green"))
    assert read.templates == ("a {c} thing", "{c}")
    assert [target for _, _, target in open_evalset(captioned).examples()] == [["a red one", "rouge é"], ["blue"]]


def test_the_webdataset_library_reads_what_we_write(captioned: Path) -> None:
    import webdataset

    samples = list(webdataset.WebDataset(str(captioned / "test/0.tar"), shardshuffle=False))
    assert [(s["__key__"], s.get("jpg", s.get("png")), s["txt"]) for s in samples] == [
        ("s0000000", RED, "a red one\nrouge é".encode()), ("s0000001", BLUE, b"blue")]


def test_the_manifest_follows_the_bytes_but_not_the_templates(labelled: Path, tmp_path: Path) -> None:
    first = open_evalset(labelled).manifest_sha256
    (labelled / "zeroshot_classification_templates.txt").write_text("{c}!\n")
    assert open_evalset(labelled).manifest_sha256 == first
    shutil.copytree(labelled, tmp_path / "copy")
    assert open_evalset(tmp_path / "copy").manifest_sha256 == first
    (labelled / "classnames.txt").write_text("blue\nred\ngreen\n")
    assert open_evalset(labelled).manifest_sha256 != first


def test_a_foreign_layout_without_optional_files_is_read(tmp_path: Path) -> None:
    (tmp_path / "old/test").mkdir(parents=True)
    rewrite(tmp_path / "old/test/0.tar", {"a/1.JPG": RED, "a/1.cls": b"7\n", "a/1.json": b"{}"})
    assert list(open_evalset(tmp_path / "old").examples()) == [("a/1", RED, 7)]


def test_hidden_members_change_no_result(labelled: Path) -> None:
    expected = list(open_evalset(labelled).examples())
    for tar in labelled.glob("test/*.tar"):
        rewrite(tar, {key: value for name, data in members(tar).items()
                      for key, value in ((f"._{name}", b"\0\5\x16\7"), (name, data))})
    assert list(open_evalset(labelled).examples()) == expected


WRONG = {
    "split": (lambda f: None, r"no split 'val'; splits present: test"),
    "too many counted": (lambda f: (f / "test/nshards.txt").write_text("3"), r"says 3, but 2 .*2\.tar is missing"),
    "too few counted": (lambda f: (f / "test/nshards.txt").write_text("1"), r"says 1, but 2 .*1\.tar is beyond"),
    "no number": (lambda f: (f / "test/nshards.txt").write_text("two"), r"says 'two'"),
    "label outside": (lambda f: (f / "classnames.txt").write_text("red\nblue\n"),
                      r"1\.tar, key s0000002: label 2 is outside classnames\.txt, which names 0 to 1"),
    "empty class": (lambda f: (f / "classnames.txt").write_text("red\n\nblue\n"), r"line 2 is empty"),
    "no placeholder": (lambda f: (f / "zeroshot_classification_templates.txt").write_text("{c}\na thing\n"),
                       r"line 2 \('a thing'\) has no \{c\}"),
    "other kind": (lambda f: (f / "dataset_type.txt").write_text("multilabel"), r"says 'multilabel'"),
    "no captions": (lambda f: (f / "dataset_type.txt").write_text("retrieval"), r"key s0000000: no \.txt member"),
    "label no number": (lambda f: rewrite(f / "test/0.tar", {"x.jpg": RED, "x.cls": b"cat"}), r"key x: label 'cat'"),
    "no image": (lambda f: rewrite(f / "test/0.tar", {"x.cls": b"1"}), r"0\.tar, key x: no image"),
    "torn tar": (lambda f: (f / "test/1.tar").write_bytes((f / "test/1.tar").read_bytes()[:700]),
                 r"1\.tar cannot be read as a WebDataset tar \(truncated tar\)"),
    "duplicate": (lambda f: rewrite(f / "test/0.tar", {"x.jpg": RED, "x.JPG": RED}), r"key x: duplicate key"),
    "not utf-8": (lambda f: (f / "classnames.txt").write_bytes(b"\xff"), r"classnames\.txt is not UTF-8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_layouts_are_named(labelled: Path, case: str) -> None:
    spoil, message = WRONG[case]
    spoil(labelled)
    with pytest.raises(InputError, match=message):
        list(open_evalset(labelled, "val" if case == "split" else "test").examples())


def test_a_missing_folder_and_a_command_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'none'} does not exist")):
        open_evalset(tmp_path / "none")
    with pytest.raises(InputError, match="would run a shell command"):
        open_evalset("pipe:touch x")


def test_writing_refuses_what_it_would_spoil(labelled: Path) -> None:
    before = open_evalset(labelled).manifest_sha256
    with pytest.raises(InputError, match="is there already"):
        write_evalset(labelled, "test", [(RED, 0)], "classification", ["red"])
    with pytest.raises(InputError, match=r"classnames\.txt differs"):
        write_evalset(labelled, "train", [(RED, 0)], "classification", ["red"])
    for examples, message in (([], "no examples"), ([(RED, [" "])], "example 0 has no caption"),
                              ([(b"GIF89a", ["x"])], "example 0: image is none of")):
        with pytest.raises(InputError, match=message):
            write_evalset(labelled.parent / "new", "test", examples, "retrieval")
    assert splits_of(labelled) == ["test"] and splits_of(labelled.parent / "new") == []
    assert open_evalset(labelled).manifest_sha256 == before
