"""A table of URLs and captions becomes urls.parquet, and every row is accounted for."""

import bz2
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import sources
from pipeline.console import InputError
from pipeline.published import write_published
from pipeline.schema import URLS, sample_id_of
from pipeline.sources import Choice, Tally, write_urls


def written(folder: Path, name: str, content: str | bytes, choice: Choice | None = None) -> tuple[Tally, list[dict]]:
    """Write `content`, turn it into a URL table; the tally and the rows, sums checked."""
    path, out = folder / name, folder / "out" / "urls.parquet"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tally = write_urls(path, out, choice or Choice("url", ("caption",)))
    table = pq.read_table(out)
    assert table.schema.equals(URLS)
    assert table.schema.metadata == URLS.metadata
    rows = table.to_pylist()
    assert [row["sample_id"] for row in rows] == [sample_id_of(row["url"]) for row in rows]
    assert tally.rows == tally.unselected + tally.merged + tally.refused + len(rows)
    return tally, rows


def refused(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "out" / "urls.refused.jsonl").read_text().splitlines()
    return [(line["line"], line["reason"]) for line in map(json.loads, lines)]


def captions(rows: list[dict]) -> dict[str, list[str]]:
    return {row["url"]: row["captions"] for row in rows}


def test_quotes_in_a_tsv_swallow_nothing(tmp_path):
    text = 'url\tcaption\nh/1\t"unbalanced\nh/2\tfine\nh/3\tends"\nh/4\tsay "hi"\nh/5\t""\n'
    _, rows = written(tmp_path, "a.tsv", text)
    assert captions(rows) == {"h/1": ['"unbalanced'], "h/2": ["fine"], "h/3": ['ends"'], "h/4": ['say "hi"'], "h/5": ['""']}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(blacklist_characters="\t\n\r", blacklist_categories=["Cs"])), min_size=1))
def test_any_text_without_tabs_survives_a_tsv(tmp_path, texts):
    lines = [f"h/{i}\tx{text}x\n" for i, text in enumerate(texts)]
    tally, rows = written(tmp_path, "a.tsv", "url\tcaption\n" + "".join(lines))
    assert [row["captions"] for row in rows] == [[f"x{text}x"] for text in texts]
    assert not tally.refused


def test_csv_is_quoted(tmp_path):
    _, rows = written(tmp_path, "a.csv", '\ufeffurl,caption\r\nh/1,"a, ""b""\nc"\r\nh/2,plain\r\n')
    assert captions(rows) == {"h/1": ['a, "b"\nc'], "h/2": ["plain"]}


def test_bad_rows_are_refused_with_line_and_reason(tmp_path):
    text = b"url\tcaption\nh/1\tgood\nh/2\ta\tb\nh/3\n\t empty\nh/4\t\xff\xfe\nh/5\t \n\nh/6\tgood\n"
    tally, rows = written(tmp_path, "a.tsv", text)
    assert captions(rows) == {"h/1": ["good"], "h/6": ["good"]}
    assert refused(tmp_path) == [(3, "3 columns instead of 2"), (4, "1 columns instead of 2"), (5, "empty url"),
                                 (6, "not UTF-8"), (7, "empty caption"), (8, "blank line")]
    assert (tally.rows, tally.refused) == (8, 6)
    written(tmp_path, "a.tsv", "url\tcaption\nh/1\tgood\n")
    assert not (tmp_path / "out" / "urls.refused.jsonl").exists(), "left over from the table before"


def test_bad_rows_of_the_other_formats(tmp_path):
    written(tmp_path, "a.csv", b'url,caption\nh/1,good\nh/2\nh/3,"a"b\nh/4,\xff\n')
    assert [line for line, _ in refused(tmp_path)] == [3, 4, 5]
    lines = ['{"url": "h/1", "caption": "a"}', "not json", "[1]", '{"caption": "no url"}',
             r'{"url": "h", "caption": "\ud800"}']
    written(tmp_path, "a.jsonl", "\n".join(lines))
    assert refused(tmp_path) == [(2, "not JSON"), (3, "not a JSON object"), (4, "empty url"), (5, "not UTF-8")]


def test_equal_urls_unite_their_captions_in_order(tmp_path):
    text = "url\tcaption\tmore\nh/b\tone\t\nh/a\tx\ty\nh/b\ttwo\tone\nh/b\tone\tthree\n"
    tally, rows = written(tmp_path, "a.tsv", text, Choice("url", ("caption", "more"), source="mine"))
    assert [(row["url"], row["captions"], row["source_row"]) for row in rows] == [
        ("h/b", ["one", "two", "three"], 1), ("h/a", ["x", "y"], 2)]
    assert tally.merged == 2
    assert {row["source"] for row in rows} == {"mine"}


def test_parquet_and_jsonl_give_the_same_rows(tmp_path):
    lines = ['{"url": "h/1", "caption": ["a", "b"]}', '{"url": "h/2", "caption": "c", "x": 1}']
    _, from_json = written(tmp_path, "a.jsonl", "\n".join(lines))
    pq.write_table(pa.table({"url": ["h/1", "h/2"], "caption": [["a", "b"], ["c"]]}), tmp_path / "b.parquet")
    _, from_parquet = written(tmp_path, "a.parquet", (tmp_path / "b.parquet").read_bytes())
    assert from_json == from_parquet
    assert captions(from_json) == {"h/1": ["a", "b"], "h/2": ["c"]}


def test_paths_are_quoted_behind_a_prefix(tmp_path):
    _, rows = written(tmp_path, "a.tsv", "url\tcaption\na b/100%#1?é.jpg\tx\n", Choice("url", ("caption",), "http://h:1/"))
    assert rows[0]["url"] == "http://h:1/a%20b/100%25%231%3F%C3%A9.jpg"


def test_where_selects_rows(tmp_path):
    text = "url\tcaption\tsplit\n" + "".join(f"h/{i}\tc\t{'dev' if i % 3 else 'train'}\n" for i in range(9))
    tally, rows = written(tmp_path, "a.tsv", text, Choice("url", ("caption",), where=(("split", "train"),)))
    assert [row["url"] for row in rows] == ["h/0", "h/3", "h/6"]
    assert tally.unselected == 6


def test_many_buckets_give_what_one_gives(tmp_path, monkeypatch):
    text = "url\tcaption\n" + "".join(f"h/{i * 7919 % 600}\tcaption {i}\n" for i in range(1000))
    whole = written(tmp_path, "a.tsv", text)
    monkeypatch.setattr(sources, "_BUCKET_BYTES", len(text) // 20)
    monkeypatch.setattr(sources, "_CHUNK_ROWS", 64)
    assert written(tmp_path, "a.tsv", text) == whole
    assert len(whole[1]) == 600


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.tsv", "", "is empty"), ("a.csv", "", "is empty"), ("a.jsonl", "", "is empty"),
    ("a.tsv", "url\tcaption\n", "no rows"), ("a.parquet", "not parquet", "no Parquet file"),
    ("a.tsv", "urll\tcaption\nh\tc\n", "did you mean 'urll'? it has urll, caption"),
    ("a.tsv", "url\tcaption\turl\nh\tc\ti\n", "has 2 columns 'url': rename all but one"),
    ("a.tsv", "url\tcaption\n\tc\n", "1 of 1 refused with 'empty url', first in line 2"),
    ("a.csv", "url,caption\nh,c\n".encode("utf-16"), "is not UTF-8, perhaps UTF-16: save it as UTF-8"),
    ("a.tsv", "url\tcaption\nh\tc\n".encode("utf-16-le"), "is not UTF-8"),
    ("a.xlsx", "", "must end in one of .tsv, .csv, .jsonl, .parquet"),
])
def test_wrong_tables_name_place_and_cure(tmp_path, name, content, says):
    with pytest.raises(InputError, match="a[.]") as caught:
        written(tmp_path, name, content)
    assert says in str(caught.value)
    assert not list(tmp_path.glob("out/*")), "nothing half-written is left"


@pytest.mark.parametrize("suffix", ["bz2", "gz"])
def test_a_list_that_was_cut_off_on_its_way_is_named(tmp_path, suffix):
    packed = {"bz2": bz2, "gz": gzip}[suffix].compress(b"".join(b"http://h/%d\tcaption\n" % row for row in range(9999)))
    file = tmp_path / f"cc12m.tsv.{suffix}"
    for data in (packed[:len(packed) // 2], b"x" + packed):
        file.write_bytes(data)
        with pytest.raises(InputError, match=f"cc12m.tsv.{suffix} is damaged or cut off .*: fetch it again"):
            write_published("cc12m", file, tmp_path / "u.parquet", 0)
        assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_where_that_fits_nothing_says_what_there_is(tmp_path):
    text = "url\tcaption\tsplit\nh/1\tc\ttrain\nh/2\tc\tdev\n"
    with pytest.raises(InputError, match="values there: train, dev"):
        written(tmp_path, "a.tsv", text, Choice("url", ("caption",), where=(("split", "tain"),)))


def test_the_command(tmp_path):
    table = tmp_path / "a.tsv"
    table.write_text('image\tsplit\tcaption\n1.jpg\ttrain\t"one\n1.jpg\ttrain\ttwo\n2.jpg\tdev\tx\nbroken\n')
    done = command("uniclip-data", "urls", "table", table, tmp_path / "u.parquet", "--url-column", "image",
                   "--where", "split=train", "--url-prefix", "http://127.0.0.1:8000/")
    assert done.returncode == 0, done.stderr
    assert "1  1 columns instead of 3 (first in line 5)" in done.stdout
    assert pq.read_table(tmp_path / "u.parquet").to_pylist()[0] | {"sample_id": 0} == {
        "url": "http://127.0.0.1:8000/1.jpg", "captions": ['"one', "two"], "source": "a", "source_row": 1, "sample_id": 0}


@pytest.mark.parametrize(("words", "says"), [
    (("missing.tsv", "u.parquet"), "the table missing.tsv does not exist"),
    (("a.tsv", "u.parquet", "--where", "split"), "must read COLUMN=VALUE"),
])
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, words, says):
    (tmp_path / "a.tsv").write_text("url\tcaption\nh\tc\n")
    done = command("uniclip-data", "urls", "table", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
