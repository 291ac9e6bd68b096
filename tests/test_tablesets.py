"""Folders of images with a table are sets as they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import encoded, picture

from pipeline.console import InputError
from pipeline.evalsets import is_evalset, open_evalset, splits_of

A, B, C = (encoded(picture(i)) for i in range(3))


def table(folder: Path, *lines: str, name: str = "labels.tsv") -> None:
    """A table whose columns are told apart by spaces here."""
    (folder / name).write_text("".join(line.replace(" ", "\t") + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set/in").mkdir(parents=True)
    for name, data in (("a.jpg", A), ("in/b.jpg", B), ("c.jpg", C)):
        (tmp_path / "set" / name).write_bytes(data)
    table(tmp_path / "set", "label image split", "t-shirt a.jpg test", '"hat in/b.jpg test', "hat c.jpg train")
    return tmp_path / "set"


def test_labels_are_numbered_alike_in_all_splits(folder: Path) -> None:
    assert is_evalset(folder) and not is_evalset(folder / "in") and splits_of(folder) == ["test", "train"]
    test, train = open_evalset(folder), open_evalset(folder, "train")
    assert test.classnames == train.classnames == ('"hat', "hat", "t-shirt") and test.kind == "classification"
    assert list(test.examples()) == [("a.jpg", A, 2), ("in/b.jpg", B, 0)] and list(train.examples()) == [("c.jpg", C, 1)]


def test_rows_of_one_image_are_its_captions(folder: Path) -> None:
    (folder / "labels.tsv").unlink()
    table(folder, "image split caption", "a.jpg test one", "in/b.jpg test two", "a.jpg test three", name="captions.tsv")
    assert list(open_evalset(folder).examples()) == [("a.jpg", A, ["one", "three"]), ("in/b.jpg", B, ["two"])]
    assert open_evalset(folder).kind == "retrieval" and open_evalset(folder).classnames == ()


def test_the_manifest_follows_images_and_table(folder: Path) -> None:
    first, train = open_evalset(folder).manifest_sha256, open_evalset(folder, "train").manifest_sha256
    (folder / "a.jpg").write_bytes(C)
    assert open_evalset(folder).manifest_sha256 != first and open_evalset(folder, "train").manifest_sha256 == train
    (folder / "a.jpg").write_bytes(A)
    assert open_evalset(folder).manifest_sha256 == first
    (folder / "labels.tsv").write_text((folder / "labels.tsv").read_text().replace("hat\tc", "cap\tc"))
    assert open_evalset(folder).manifest_sha256 != first


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "split": (lambda f: None, r"labels\.tsv has no split 'val'; splits present: test, train"),
    "image gone": (lambda f: (f / "a.jpg").unlink(), r"lists .*a\.jpg, which is not there \(1 such\)"),
    "column gone": (lambda f: table(f, "image label"), "has no column 'split'"),
    "ragged": (lambda f: table(f, "image split label", "a.jpg test"), "line 2: 2 columns, the header has 3"),
    "outside": (lambda f: table(f, "image split label", "../a.jpg test x"), "line 2: give an image below"),
    "not utf-8": (lambda f: (f / "labels.tsv").write_bytes(b"image\tsplit\tlabel\n\xff"), "is not UTF-8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tables_are_named(case: str, folder: Path) -> None:
    spoil, message = WRONG[case]
    spoil(folder)
    with pytest.raises(InputError, match=message):
        open_evalset(folder, "val" if case == "split" else "test")
