"""Every row of a table, of any length and any content, ends as a URL, a merge or a counted reason."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import random_tables

from pipeline.console import InputError
from pipeline.sources import Choice, Tally, write_urls

CHOICE = Choice("url", ("caption",))


def stored(path: Path, rows: list[tuple[str, str]]) -> Path:
    """The rows in the format that the path's ending names."""
    urls, captions = zip(*rows, strict=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"url": url, "caption": text}) + "\n" for url, text in rows))
    else:
        comma = "," if path.suffix == ".csv" else "\t"
        path.write_text(f"url{comma}caption\n" + "".join(f"{url}{comma}{text}\n" for url, text in rows))
    return path


def read(path: Path) -> tuple[Tally, list[tuple[str, list[str], int]]]:
    """The tally, and each URL with its captions and its row in the table."""
    out = path.with_name("urls.parquet")
    tally = write_urls(path, out, CHOICE)
    return tally, [(row["url"], row["captions"], row["source_row"]) for row in pq.read_table(out).to_pylist()]


@pytest.mark.parametrize("rows", [1, 99, 100, 101, 65_535, 65_537])
@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_tables_of_any_length_are_read_to_their_end(tmp_path, ending, rows):
    tally, found = read(stored(tmp_path / f"a.{ending}", [(f"http://h/{n}", f"text {n}") for n in range(rows)]))
    assert found == [(f"http://h/{n}", [f"text {n}"], n + 1) for n in range(rows)]
    assert (tally.rows, tally.urls, tally.refused, tally.merged) == (rows, rows, 0, 0)


def agrees(seed: int, folder: Path) -> int:
    """One random table: our URLs, refusals and sums, and the cells that another reader finds. Returns its rows."""
    made = random_tables.table(seed, folder)
    others = list(random_tables.read_by_others(made))
    assert [tuple(map(plain, cells)) for cells in others] == [tuple(map(plain, cells)) for cells in made.cells], seed
    log = folder / "urls.refused.jsonl"
    if not made.urls():
        with pytest.raises(InputError, match="has no usable row|expected one JSON object a line"):
            read(made.path)
        return len(made.rows)
    tally, found = read(made.path)
    assert found == made.urls(), seed
    refused = [(row["line"], row["reason"]) for row in map(json.loads, log.read_text().splitlines())] if log.exists() else []
    assert refused == made.refused(), seed
    assert tally.rows == len(made.rows) == tally.urls + tally.merged + tally.refused, seed
    made.path.unlink()
    return tally.rows


def plain(value: Any) -> Any:
    """Text as bytes: what formats without types hold."""
    return value.encode() if isinstance(value, str) else value


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("pipeline.tables._BATCH_ROWS", 16)
    monkeypatch.setattr("pipeline.sources._CHUNK_ROWS", 10)
    monkeypatch.setattr("pipeline.sources._BUCKET_BYTES", 30_000)


def test_100_random_tables_end_as_pandas_and_pyarrow_read_them(tmp_path, small_blocks):
    assert sum(agrees(seed, tmp_path) for seed in range(100)) > 4_000


@pytest.mark.slow
def test_2000_random_tables_end_as_pandas_and_pyarrow_read_them(tmp_path, small_blocks):
    rows = sum(agrees(seed, tmp_path) for seed in range(2_000))
    print(f"2,000 tables, {rows:,} rows")
    assert rows > 80_000
