"""Every row of a table, of any length and any content, ends as a URL, a merge or a counted reason."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
