"""The four published URL lists of Open30M, each with its own quirks, read as tables.

Row counts are the published ones: a file cut short, or another file of the same set, is noticed before anything is fetched.
"""

import html
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np

from pipeline.choice import Choice
from pipeline.console import InputError, existing
from pipeline.sources import Tally, write_table
from pipeline.tables import Read, Table, cells_of, jsonl, lines, opened, tsv

_URL = re.compile(r"(?i)https?://")
_TAG = re.compile(r"<[^<>]*>")
_LOOK_AT = 100
# Columns of YFCC100M's yfcc100m_dataset, by their number: with line number and photo hash (the file that OpenAI's list
# counts in) or without (Yahoo's ten parts) → places of photo id, title, description, download URL, video mark.
_ID_DIGITS = 18  # of a photo id that int64 holds; Flickr's have 10 or 11
_METADATA = {25: (1, 8, 9, 16, 24), 23: (0, 6, 7, 14, 22)}
_SUBSET_TEXT = 400  # bytes of metadata text that one line of the subset list stands for, against 40 of its own


@dataclass(frozen=True)
class Published:
    """A published list: how it is read, which columns count, and how many rows it must have."""

    read: Callable[[Path, ExitStack], Table]
    captions: tuple[str, ...]
    rows: tuple[int, ...]


def _headerless(names: list[str]) -> Callable[[Path, ExitStack], Table]:
    def read(path: Path, stack: ExitStack) -> Table:
        return _plausible(tsv(path, stack, names), path)

    return read


def _plausible(table: Table, path: Path) -> Table:
    """The same table, unless its first rows show another layout. Raises InputError."""
    head = list(islice(table.rows, _LOOK_AT))
    good = [cells for _, cells in head if isinstance(cells, list)]
    at = table.names.index("url")
    expected = " ⇥ ".join(table.names)
    if not head:
        raise InputError(f"{path} is empty")
    if 2 * len(good) < len(head):
        line, why = next((line, cells) for line, cells in head if isinstance(cells, str))
        raise InputError(f"{path} line {line}: {why}, expected {expected} without a header: this is another file")
    if 2 * sum(bool(_URL.match(str(cells[at]))) for cells in good) < len(good):
        wrong = next(str(cells[at]) for cells in good if not _URL.match(str(cells[at])))
        raise InputError(f"{path}: column {at + 1} is no URL ({wrong[:40]!r}), expected {expected} without a header: "
                         "this is another file, perhaps of another set")
    return Table(table.names, chain(head, table.rows), table.total, table.position, table.squeeze)


def _declip(path: Path, stack: ExitStack) -> Table:
    """JSON lines, though the file is called .json."""
    table = jsonl(path, stack, ("url", "caption"))
    missing = {"url", "caption"} - set(table.names)
    if missing:
        raise InputError(f"{path} line 1: no {' and '.join(sorted(missing))}; expected one JSON object a line with caption, "
                         f"filename and url, found {', '.join(table.names) or 'no object'}: this is another file")
    return table


LISTS = {
    "cc3m": Published(_headerless(["caption", "url"]), ("caption",), (3_318_333, 15_840)),  # training, validation
    "cc12m": Published(_headerless(["url", "caption"]), ("caption",), (12_423_374,)),
    "yfcc15m-v2": Published(_declip, ("caption",), (15_388_848,)),
}
YFCC15M_V1_ROWS = 14_829_396


def _expected(rows: tuple[int, ...], expect: int | None) -> tuple[int, ...]:
    return rows if expect is None else (expect,) if expect else ()


def write_published(name: str, path: Path, out: Path, expect: int | None = None) -> Tally:
    """One of LISTS → `out`. expect: rows it must have instead of the published number; 0: any."""
    existing(path, f"the {name} list")
    published = LISTS[name]
    return write_table(path, out, Choice("url", published.captions, source=name,
                                         expect=_expected(published.rows, expect)), published.read)


def write_yfcc15m_v1(path: Path, metadata: tuple[Path, ...], out: Path, expect: int | None = None) -> Tally:
    """OpenAI's list of photo ids, joined with the parts of YFCC100M's metadata → `out`; captions: title, description."""
    for part in (existing(path, "the subset list"), *metadata):
        existing(part, "the metadata file", "fetch yfcc100m_dataset of YFCC100M's core dataset")
    choice = Choice("url", ("title", "description"), source="yfcc15m-v1", expect=_expected((YFCC15M_V1_ROWS,), expect))
    return write_table(path, out, choice, lambda path, stack: _joined(path, metadata, stack))


def _joined(path: Path, metadata: tuple[Path, ...], stack: ExitStack) -> Table:
    ids, bad, packed = _photo_ids(path, stack)
    sizes = [part.stat().st_size for part in metadata]
    at: list[Callable[[], int]] = []

    def rows() -> Iterator[Read]:
        yield from bad
        found = np.zeros(len(ids), bool)
        found[_repeated(ids)] = True
        yield from ((int(row) + 1, "photo id twice in the list") for row in np.flatnonzero(found))
        order = np.argsort(ids, kind="stable")
        listed = ids[order]
        for part in metadata:
            file, position, _ = opened(part, stack)
            at.append(position)
            for number, raw in enumerate(lines(file, part), start=1):
                cells = cells_of(raw)
                photo = _photo_id(cells, part, number)
                place = int(np.searchsorted(listed, photo)) if photo is not None else len(listed)
                if place < len(listed) and listed[place] == photo and not found[order[place]]:
                    found[order[place]] = True
                    yield int(order[place]) + 1, _photo(cells)
        known_bad = {line for line, _ in bad}
        yield from ((int(row) + 1, "photo id not in the metadata") for row in np.flatnonzero(~found)
                    if int(row) + 1 not in known_bad)

    def position() -> int:
        return sum(sizes[:max(len(at) - 1, 0)]) + (at[-1]() if at else 0)

    return Table(["url", "title", "description"], rows(), sum(sizes), position, packed * _SUBSET_TEXT // 40, numbered=True)


def _repeated(ids: np.ndarray) -> np.ndarray:
    """Rows whose id occurred before; −1 stands for a line without one."""
    first = np.zeros(len(ids), bool)
    first[np.unique(ids, return_index=True)[1]] = True
    return np.flatnonzero(~first & (ids >= 0))


def _photo_ids(path: Path, stack: ExitStack) -> tuple[np.ndarray, list[Read], int]:
    """The photo id of each line of the subset list, the lines without one, and how much larger than the file text is."""
    file, _, squeeze = opened(path, stack)
    bad: list[Read] = []

    def ids() -> Iterator[int]:
        for line, raw in enumerate(lines(file, path), start=1):
            cells = raw.rstrip(b"\r\n").split(b"\t")
            if len(cells) == 3 and cells[1].isdigit() and len(cells[1]) <= _ID_DIGITS:
                yield int(cells[1])
                continue
            if line == 1:
                raise InputError(f"{path} line 1: expected line number ⇥ photo id ⇥ photo hash, found "
                                 f"{raw[:60].decode('utf-8', 'replace')!r}: this is another file")
            bad.append((line, f"{len(cells)} columns instead of 3" if len(cells) != 3 else "photo id is no number"))
            yield -1

    return np.fromiter(ids(), np.int64), bad, squeeze


def _photo_id(cells: list[str], part: Path, number: int) -> int | None:
    layout = _METADATA.get(len(cells))
    text = cells[layout[0]] if layout else cells[1] if len(cells) > 1 else ""
    if layout is None and number == 1:
        raise InputError(f"{part} line 1: {len(cells)} columns, expected YFCC100M's 25 (or 23 in Yahoo's parts): "
                         "this is another file")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _ID_DIGITS else None


def _photo(cells: list[str]) -> list | str:
    """url, title, description of a line of the metadata; or why there are none."""
    layout = _METADATA.get(len(cells))
    if layout is None:
        return f"metadata has {len(cells)} columns instead of 25"
    _, title, description, url, video = layout
    if cells[video] == "1":
        return "a video"
    return [cells[url], _plain(cells[title]), _plain(cells[description])]


def _plain(text: str) -> str:
    """URL-encoded HTML as Flickr's users wrote it → its text, as SLIP reads it."""
    decoded = unquote_to_bytes(text.replace("+", " ").encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
    return " ".join(_TAG.sub(" ", html.unescape(decoded)).split())
