"""Evaluation sets as plain folders of images with one table, read as they are.

    FOLDER/labels.tsv     image, split, label      classification; labels in sorted order are classes 0, 1, …
    FOLDER/captions.tsv   image, split, caption    retrieval; several rows of one image are its captions

Tab-separated, with a header, no quoting; `image` is a path below FOLDER.
"""

from collections.abc import Iterator
from pathlib import Path

from pipeline.console import InputError

LABELS, CAPTIONS = "labels.tsv", "captions.tsv"
_COLUMN = {LABELS: "label", CAPTIONS: "caption"}

Row = tuple[str, str, str]  # image, split, label or caption


def table_of(folder: Path) -> Path | None:
    """The table of a set folder, None when it has another layout."""
    return next((folder / name for name in _COLUMN if (folder / name).is_file()), None)


def rows(table: Path) -> list[Row]:
    """Every row. Raises InputError naming the line that is none."""
    try:
        lines = table.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{table} is not UTF-8 (byte {error.start}): convert it") from None
    header = lines[0].rstrip("\r").split("\t")
    wanted = ("image", "split", _COLUMN[table.name])
    missing = [name for name in wanted if name not in header]
    if missing:
        raise InputError(f"{table} has no column {missing[0]!r}: its first line must name {', '.join(wanted)}")
    places = [header.index(name) for name in wanted]
    found = []
    for number, line in enumerate(lines[1:], 2):
        cells = line.rstrip("\r").split("\t")
        if line and len(cells) != len(header):
            raise InputError(f"{table}, line {number}: {len(cells)} columns, the header has {len(header)}")
        if line:
            image, split, value = (cells[place].strip() for place in places)
            if not image or not value or Path(image).is_absolute() or ".." in Path(image).parts:
                raise InputError(f"{table}, line {number}: give an image below the folder and a {_COLUMN[table.name]}")
            found.append((image, split, value))
    return found


def classes(table: Path) -> tuple[str, ...]:
    """The labels of all splits in sorted order, none in a table of captions."""
    return tuple(sorted({value for *_, value in rows(table)})) if table.name == LABELS else ()


def splits(table: Path) -> list[str]:
    """Names of the splits in the order of the alphabet."""
    return sorted({split for _, split, _ in rows(table)})


def images(table: Path, split: str) -> list[Path]:
    """The image files of a split, each once. Raises InputError for one that is missing."""
    found = [table.parent / image for image in dict.fromkeys(image for image, own, _ in rows(table) if own == split)]
    gone = [path for path in found if not path.is_file()]
    if gone:
        raise InputError(f"{table} lists {gone[0]}, which is not there ({len(gone)} such)")
    return found


def examples(table: Path, split: str) -> Iterator[tuple[str, bytes, int | list[str]]]:
    """Yield (path in the folder, image bytes, label or captions) in the order of the table."""
    own = [(image, value) for image, of, value in rows(table) if of == split]
    if table.name == LABELS:
        number = {name: label for label, name in enumerate(classes(table))}
        yield from ((image, (table.parent / image).read_bytes(), number[value]) for image, value in own)
        return
    captions: dict[str, dict[str, None]] = {}  # an equal caption of an image counts once, as in an index
    for image, value in own:
        captions.setdefault(image, {})[value] = None
    yield from ((image, (table.parent / image).read_bytes(), list(texts)) for image, texts in captions.items())


def of_two_labels(table: Path, split: str) -> list[str]:
    """The images that the split lists under more than one label."""
    labels: dict[str, set[str]] = {}
    for image, own, value in rows(table) if table.name == LABELS else ():
        if own == split:
            labels.setdefault(image, set()).add(value)
    return [image for image, found in labels.items() if len(found) > 1]
