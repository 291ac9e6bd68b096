"""Every row of a table, of any length and any content, ends as a URL, a merge or a counted reason."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import conftest
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import random_tables
from conftest import encoded

from pipeline.console import InputError
from pipeline.evalsets import open_evalset, write_evalset
from pipeline.published import write_published
from pipeline.sources import Choice, Tally, write_urls
from pipeline.takedown import parse

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


MARK = "\ufeff".encode()


def test_a_resource_is_one_url_and_one_takedown(tmp_path):
    """Ids of URLs without a fragment are what they always were: other people's sets have them."""
    (tmp_path / "a.tsv").write_text("url\tcaption\nhttp://h/1#x\tone\nhttp://h/1\ttwo\nhttp://h/1#y?z\tone\nhttp://h/2?a#\tx\n")
    tally, found = read(tmp_path / "a.tsv")
    assert (found, tally.merged) == ([("http://h/1", ["one", "two"], 1), ("http://h/2?a", ["x"], 4)], 2)
    ids = pq.read_table(tmp_path / "urls.parquet")["sample_id"].to_pylist()
    assert ids[0] == int.from_bytes(hashlib.sha256(b"http://h/1").digest()[:8], "big") >> 1
    asked = parse(["http://h/1#of-a-page", "http://h/2?a"]).named("asked").ids
    assert set(ids) <= set(asked)
    before = int.from_bytes(hashlib.sha256(b"http://h/1#of-a-page").digest()[:8], "big") >> 1
    assert before in asked, "sets indexed before have the id of the whole URL"


@pytest.mark.parametrize(("name", "lines"), [
    ("cc3m", ["one\thttp://h/1"]), ("cc12m", ["http://h/1\tone"]), ("yfcc15m-v2", ['{"url": "http://h/1", "caption": "one"}'])])
def test_published_lists_may_begin_with_a_mark(tmp_path, name, lines):
    (tmp_path / "a").write_bytes(MARK + "\n".join(lines).encode())
    write_published(name, tmp_path / "a", tmp_path / "u.parquet", 0)
    (row,) = pq.read_table(tmp_path / "u.parquet").to_pylist()
    assert (row["url"], row["captions"]) == ("http://h/1", ["one"])


def test_evaluation_sets_and_prompts_may_begin_with_a_mark(tmp_path):
    picture = encoded(conftest.picture(1))
    folder = tmp_path / "set"
    write_evalset(folder, "test", [(picture, 0)], "classification", ["cat"], ["a {c}"])
    for name in ("dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt"):
        (folder / name).write_bytes(MARK + (folder / name).read_bytes())
    opened = open_evalset(folder)
    assert (opened.classnames, opened.templates, len(list(opened.examples()))) == (("cat",), ("a {c}",), 1)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "0.jpg").write_bytes(picture)
    (tmp_path / "table" / "labels.tsv").write_bytes(MARK + b"image\tsplit\tlabel\n0.jpg\ttest\tcat\n")
    assert [label for *_, label in open_evalset(tmp_path / "table").examples()] == [0]


def test_a_long_quoted_cell_is_read_or_refused_alone(tmp_path):
    """128 KiB were the limit; beyond it a cell with line breaks was taken for an open quote, and ended the whole table."""
    cells = {length: "line\n" * (length // 5) for length in (131_070, 131_075, 900_000, 1_000_010, 17 << 20)}
    rows = [f'http://h/{length},"{text}"\n' for length, text in cells.items() if length < 16 << 20]
    (tmp_path / "a.csv").write_text("url,caption\n" + "".join(rows) + "http://h/end,x\n")
    tally, found = read(tmp_path / "a.csv")
    assert [(url, len(texts[0])) for url, texts, _ in found] == [
        ("http://h/131070", 131_069), ("http://h/131075", 131_074), ("http://h/900000", 899_999), ("http://h/end", 1)]
    assert list(tally.reasons) == ["captions of more than 1,000,000 characters"]
    (tmp_path / "b.csv").write_text(f'url,caption\nhttp://h/1,"{cells[17 << 20]}\nhttp://h/2,x\n')
    with pytest.raises(InputError, match="b.csv line 2: .*a quote that opens there is not closed"):
        read(tmp_path / "b.csv")


@pytest.mark.parametrize(("content", "says"), [
    ('[{"url": "h", "caption": "c"}]', "holds a JSON array"),
    ('\n [\n{"url": "h", "caption": "c"}\n]\n', "holds a JSON array"),
    ('{\n"url": "h",\n"caption": "c"\n}\n', "not JSON: expected one JSON object a line"), ("\n\n", "names no column"),
    ("", "is empty"),
    ('{"url": "h", "text": "c"}\n' * 70_000, "has no column 'caption'")])
def test_json_that_is_no_lines_of_objects_is_named(tmp_path, content, says):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InputError, match=says):
        read(tmp_path / "a.jsonl")


def test_a_key_that_comes_late_is_found(tmp_path):
    lines = [json.dumps({"url": f"http://h/{n}"}) for n in range(500)] + ['{"url": "http://h/500", "caption": "late"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tally, found = read(tmp_path / "a.jsonl")
    assert found == [("http://h/500", ["late"], 501)] and tally.reasons == {"empty caption": (500, 1)}


def test_a_bomb_of_one_line_and_a_damaged_table_are_refused(tmp_path):
    with gzip.open(tmp_path / "cc12m.tsv.gz", "wb", 1) as bomb:
        for _ in range(80):
            bomb.write(bytes(1 << 20))
    with pytest.raises(InputError, match="line 1: more than 67,108,864 bytes without an end"):
        write_published("cc12m", tmp_path / "cc12m.tsv.gz", tmp_path / "u.parquet", 0)
    path = stored(tmp_path / "a.parquet", [(f"http://h/{n}", f"text {n}") for n in range(5_000)])
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2:])
    with pytest.raises(InputError, match="a.parquet is damaged"):
        read(path)
