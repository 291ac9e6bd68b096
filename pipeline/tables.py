"""Tables as others write them, row by row: csv, tsv, JSON lines, Parquet. A row that cannot be read says why."""

import bz2
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.console import InputError

_BATCH_ROWS = 1_024  # few, for a caption may have a million characters
_LOOK_AT, _LOOK_AT_MOST = 100, 65_536  # lines of JSON, for the names of columns
_CELL_CHARACTERS = 16 << 20  # of a quoted cell; a quote that is never closed must not fill the memory
_PARQUET_SQUEEZE = 4
_LINE_BYTES = 64 << 20  # of one line; an endless one must not fill the memory
_BOM = b"\xef\xbb\xbf"

# A row as read: its line (Parquet: row) number counted from 1, then its cells, or why it cannot be one.
Read = tuple[int, list[Any] | str]


@dataclass(frozen=True)
class Table:
    """A table being read. `position()` of `total` bytes or rows tells how far; `squeeze`: text is as many times larger.

    `numbered`: the numbers beside the rows are their places in the source, which need not be met in that order.
    """

    names: list[str]
    rows: Iterator[Read]
    total: int
    position: Callable[[], int]
    squeeze: int = 1
    numbered: bool = False


_UNPACKERS = {".bz2": bz2.open, ".gz": gzip.open}
_UNPACKED = 6  # text is about this much larger than when compressed


def opened(path: Path, stack: ExitStack) -> tuple[BinaryIO, Callable[[], int], int]:
    """The bytes of a file that may be compressed, how far in the file itself reading is, how much larger text is."""
    file = stack.enter_context(path.open("rb"))
    unpack = _UNPACKERS.get(path.suffix)
    return (cast(BinaryIO, stack.enter_context(unpack(file))), file.tell, _UNPACKED) if unpack else (file, file.tell, 1)


def lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a file that may be compressed, without a byte order mark, as Windows puts it before UTF-8.

    The file stays open when the lines are left half read: its owner may seek and read again. Raises InputError where it
    cannot be unpacked, or where a line is too long to be one.
    """
    try:
        for number, line in enumerate(iter(partial(file.readline, _LINE_BYTES), b""), start=1):
            if len(line) == _LINE_BYTES:
                raise InputError(f"{path} line {number}: more than {_LINE_BYTES:,} bytes without an end: this is no table")
            yield line if number > 1 else line.removeprefix(_BOM)
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path} is damaged or cut off ({error}): fetch it again") from None


def tsv(path: Path, stack: ExitStack, names: list[str] | None = None) -> Table:
    """Tabs between cells, no quoting whatsoever: a quote is a letter like any other. names: where no header has them."""
    file, position, squeeze = opened(path, stack)
    first, header, left = 1, names, lines(file, path)
    if header is None:
        first, header = 2, cells_of(next(left, b""))

    def rows() -> Iterator[Read]:
        for line, raw in enumerate(left, start=first):
            cells = cells_of(raw)
            yield line, cells if len(cells) == len(header) else _wrong_width(cells, header)

    return Table(header, rows(), path.stat().st_size, position, squeeze)


def cells_of(raw: bytes) -> list[str]:
    """The cells of one line of a tsv."""
    return _text(raw).split("\t")


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\r\n").decode("utf-8", "surrogateescape")  # undecodable bytes are refused with their row


def _wrong_width(cells: list[str], names: list[str]) -> str:
    return "blank line" if not any(cells) else f"{len(cells)} columns instead of {len(names)}"


def _csv(path: Path, stack: ExitStack) -> Table:
    """RFC 4180 quoting; a cell may hold line breaks."""
    raw = stack.enter_context(path.open("rb"))
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(_CELL_CHARACTERS)
    reader = csv.reader(text, strict=True)
    try:
        names = next(reader, [])
    except csv.Error as error:
        raise InputError(f"{path} line 1: {error}") from None

    def rows() -> Iterator[Read]:
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if reader.line_num > line:  # it read on in search of the quote: good rows are in what it threw away
                    raise InputError(f"{path} line {line}: {error}: a quote that opens there is not closed; mend it, or "
                                     "save the table as .tsv, where a quote is a letter like any other") from None
                yield line, f"csv: {error}"
                continue
            yield line, cells if len(cells) == len(names) else _wrong_width(cells, names)

    return Table(names, rows(), path.stat().st_size, raw.tell)


def jsonl(path: Path, stack: ExitStack, wanted: Collection[str] = ()) -> Table:
    """One object a line; the columns are the keys of the first hundred, or of more until all `wanted` ones are met."""
    file, position, squeeze = opened(path, stack)
    names: dict[str, None] = {}
    found, first = False, b""
    for number, raw in enumerate(islice(lines(file, path), _LOOK_AT_MOST), start=1):
        row, first = _object(raw), first or raw.strip()
        if isinstance(row, dict):
            names, found = names | dict.fromkeys(row), True
        if number >= _LOOK_AT and names.keys() >= set(wanted):
            break
    if first[:1] == b"[":
        raise InputError(f"{path} holds a JSON array, expected one JSON object a line: write it so (jq -c '.[]' {path.name})")
    if first and not found:
        raise InputError(f"{path}, {_object(first)}: expected one JSON object a line in UTF-8, found {first[:40]!r}")
    file.seek(0)

    def rows() -> Iterator[Read]:
        for line, raw in enumerate(lines(file, path), start=1):
            row = _object(raw)
            yield line, [row.get(name) for name in names] if isinstance(row, dict) else row

    return Table(list(names), rows(), path.stat().st_size, position, squeeze)


def _object(raw: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(raw.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return "not JSON" if raw.strip() else "blank line"
    return value if isinstance(value, dict) else "not a JSON object"


def _parquet(path: Path, stack: ExitStack, wanted: Collection[str]) -> Table:
    """Only the `wanted` columns are read: beside them may lie pictures, or types that Python has not."""
    try:
        file = stack.enter_context(pq.ParquetFile(path))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise InputError(f"{path} is no Parquet file: {error}") from None
    names, at = file.schema_arrow.names, 0

    def rows() -> Iterator[Read]:
        nonlocal at
        for batch in _batches(file, path, [name for name in names if name in wanted]):
            columns = [_values(batch.column(name)) if name in wanted else repeat(None, batch.num_rows) for name in names]
            for cells in zip(*columns, strict=True):
                at += 1
                yield at, list(cells)

    return Table(names, rows(), file.metadata.num_rows, lambda: at, _PARQUET_SQUEEZE)


def _batches(file: pq.ParquetFile, path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(_BATCH_ROWS, columns=columns)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise InputError(f"{path} is damaged, or holds what cannot be read ({error}): write it again") from None


def _values(column: pa.Array) -> list[Any]:
    """The cells in Python's types; a writer may have put any bytes into a column of strings, any number into one of dates."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b"\xff"  # like the cell itself no UTF-8
    except (ValueError, OverflowError):
        return ()  # no text


READERS = {".tsv": lambda path, stack, wanted: tsv(path, stack), ".csv": lambda path, stack, wanted: _csv(path, stack),
           ".jsonl": jsonl, ".parquet": _parquet}
