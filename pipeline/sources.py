"""Any table of URLs and captions → urls.parquet, every row accounted for.

Rows travel: read → scattered by hash of the URL, so that equal URLs meet in one bucket that fits in memory → united →
scattered by row number, so that the order of the source comes back. Memory is one bucket, however long the table.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import parquet
from pipeline.choice import Choice, Selector
from pipeline.console import InputError, WorkFailed, existing
from pipeline.files import replacing
from pipeline.progress import Meter
from pipeline.schema import URLS, sample_id_of
from pipeline.seals import sealed_json
from pipeline.tables import READERS, Table

_CHUNK_ROWS = 65_536
_BUCKET_BYTES = 64_000_000  # of text; what is built from it in memory is about five times as large


@dataclass
class Tally:
    """rows = unselected + urls + merged + refused. Reasons map to (count, first line)."""

    rows: int = 0
    unselected: int = 0
    urls: int = 0
    merged: int = 0
    reasons: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def refused(self) -> int:
        return sum(count for count, _ in self.reasons.values())

    def refuse(self, line: int, reason: str) -> None:
        count, first = self.reasons.get(reason, (0, line))
        self.reasons[reason] = count + 1, min(first, line)

    def lines(self) -> list[str]:
        """The sum, for people."""
        parts = [(self.rows, "rows"), (-self.unselected, "not selected"), (-self.merged, "merged into an equal URL"),
                 (-self.refused, "refused"), (self.urls, "URLs")]
        detail = [f"  {count:>10,}  {reason} (first in line {first:,})"
                  for reason, (count, first) in sorted(self.reasons.items(), key=lambda item: -item[1][0])]
        lines = [f"{count:>12,}  {what}" for count, what in parts if count]
        return [*lines[:-1], *detail, lines[-1]] if detail else lines

    def why_nothing(self, values_seen: Iterable[str]) -> str:
        """One line for a table that gives no URL at all."""
        if not self.rows:
            return "has a header but no rows"
        if not self.reasons:
            return f"has no row with what --where asks for; values there: {', '.join(values_seen)}"
        reason, (count, first) = max(self.reasons.items(), key=lambda item: item[1])
        return f"has no usable row: {count:,} of {self.rows:,} refused with {reason!r}, first in line {first}"


def _chunks(table: Table, select: Selector, choice: Choice, refuse: Callable[[int, str], None],
            tally: Tally) -> Iterator[pa.Table]:
    """Tables of schema.URLS, duplicates still in them. Raises InputError when the rows are not as many as expected."""
    columns: tuple[list, ...] = ([], [], [])
    held = 0  # characters
    with Meter("reading", table.total) as meter:
        for line, cells in table.rows:
            tally.rows += 1
            found = select(cells) if isinstance(cells, list) else cells
            if isinstance(found, str):
                refuse(line, found)
            elif found is None:
                tally.unselected += 1
            else:
                for column, value in zip(columns, (*found, line if table.numbered else tally.rows), strict=True):
                    column.append(value)
                held += sum(map(len, found[1]))
            if tally.rows % _CHUNK_ROWS == 0:
                meter.at(table.position())
            if len(columns[0]) == _CHUNK_ROWS or held > _BUCKET_BYTES:
                yield _as_table(columns, choice.source)
                columns, held = ([], [], []), 0
    if choice.expect and tally.rows not in choice.expect:
        raise InputError(f"{select.path} has {tally.rows:,} rows instead of {' or '.join(f'{n:,}' for n in choice.expect)}: "
                         "fetch it again, or say --expect with the number you mean (0: any)")
    if tally.rows == tally.unselected + tally.refused:
        raise InputError(f"{select.path} {tally.why_nothing(select.seen)}")
    yield _as_table(columns, choice.source)


def _as_table(columns: tuple[list, ...], source: str) -> pa.Table:
    urls, captions, rows = columns
    ids = [sample_id_of(url) for url in urls]
    return pa.table([urls, captions, [source] * len(urls), rows, ids], schema=URLS)


def _scatter(tables: Iterable[pa.Table], part_of: Callable[[pa.Table], np.ndarray], parts: int,
             folder: Path) -> list[Path]:
    """Each row into file `part_of` it, of `parts`; order is kept inside a file."""
    folder.mkdir()
    paths = [folder / f"{part}.arrow" for part in range(parts)]
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(path, URLS)) for path in paths]
        for table in tables:
            belongs = part_of(table)
            for part in np.unique(belongs):
                writers[part].write_table(table.take(np.flatnonzero(belongs == part)))
    return paths


def _read(path: Path) -> pa.Table:
    with pa.ipc.open_stream(path) as stream:
        return stream.read_all()


def _united(bucket: pa.Table, tally: Tally) -> pa.Table:
    """Equal URLs become one row, the first, with all their captions in order, each text once."""
    bucket = bucket.sort_by("source_row")  # joined lists are not met in their order
    codes = bucket["url"].combine_chunks().dictionary_encode().indices.to_numpy()
    repeated = np.bincount(codes)[codes] > 1 if len(codes) else np.zeros(0, bool)
    captions: dict[int, dict[str, None]] = {}
    for code, texts in zip(codes[repeated], bucket["captions"].filter(repeated).to_pylist(), strict=True):
        captions.setdefault(int(code), {}).update(dict.fromkeys(texts))
    first = np.unique(codes, return_index=True)[1]
    first = first[repeated[first]]
    joined = pa.array([list(captions[int(code)]) for code in codes[first]], URLS.field("captions").type)
    merged = bucket.take(first).set_column(URLS.get_field_index("captions"), "captions", joined)
    tally.merged += int(repeated.sum()) - len(first)
    return pa.concat_tables([bucket.filter(~repeated), merged])


def _write(chunks: Iterator[pa.Table], out: Path, buckets: int, tally: Tally) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        by_hash = _scatter(chunks, lambda t: t["sample_id"].to_numpy() % buckets, buckets, Path(scratch, "hash"))
        by_row = _scatter((_united(_read(path), tally) for path in by_hash),
                          lambda t: (t["source_row"].to_numpy() - 1) * buckets // tally.rows, buckets,
                          Path(scratch, "row"))
        with parquet.writing(out, URLS) as writer:
            for path in by_row:
                rows = _read(path).sort_by("source_row")
                tally.urls += rows.num_rows
                writer.write_table(rows, row_group_size=_CHUNK_ROWS)
            if tally.rows != tally.unselected + tally.refused + tally.merged + tally.urls:
                raise WorkFailed(f"the rows do not add up, {out} is not written: {tally}")


def write_urls(path: Path, out: Path, choice: Choice) -> Tally:
    """Read a csv, tsv, jsonl or parquet table as `write_table` does."""
    existing(path, "the table")
    if path.suffix not in READERS:
        raise InputError(f"{path} must end in one of {', '.join(READERS)}")
    wanted = {choice.url, *choice.captions, *(column for column, _ in choice.where)}
    return write_table(path, out, choice, lambda path, stack: READERS[path.suffix](path, stack, wanted))


def write_table(path: Path, out: Path, choice: Choice, read: Callable[[Path, ExitStack], Table]) -> Tally:
    """Write `out` (schema.URLS) and, if any row is refused, OUT.refused.jsonl.

    `source_row` counts the table's rows from 1. Raises InputError for a wrong file or column, or when nothing is left.
    """
    if out.exists() and out.samefile(path):
        raise InputError(f"{out} is the table itself: give another name for the URLs, such as {path.stem}-urls.parquet")
    tally, refusals = Tally(), out.with_suffix(".refused.jsonl")
    choice = replace(choice, source=choice.source or path.stem)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(refusals) as temporary, ExitStack() as stack:
        log = stack.enter_context(temporary.open("w", encoding="utf-8"))
        table = read(path, stack)
        if not any(table.names):
            raise InputError(f"{path} {'names no column' if path.stat().st_size else 'is empty'}")
        if re.search("[\0\ud800-\udfff]", "".join(table.names)):  # undecodable bytes are read as surrogates
            raise InputError(f"{path} is not UTF-8, perhaps UTF-16: save it as UTF-8")

        def refuse(line: int, reason: str) -> None:
            tally.refuse(line, reason)
            log.write(sealed_json({"line": line, "reason": reason}).decode() + "\n")

        select = Selector(table, choice, path)
        chunks = _chunks(table, select, choice, refuse, tally)
        _write(chunks, out, 1 + path.stat().st_size * table.squeeze // _BUCKET_BYTES, tally)
    if not tally.refused:
        refusals.unlink()
    return tally


def first_url(urls: Path) -> str:
    """The first URL of a table that `write_urls` wrote, "" when it has none."""
    batch = next(parquet.opened(urls, "write it again").iter_batches(1, columns=["url"]), None)
    return "" if batch is None else batch["url"][0].as_py()
