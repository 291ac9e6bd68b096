"""The four published lists, quirks included, become URL tables; other files, and files cut short, are refused."""

import bz2
import json
from pathlib import Path
from urllib.parse import quote_plus

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import command

from pipeline.console import InputError
from pipeline.published import LISTS, write_published, write_yfcc15m_v1

LABELS = "caption\thttp://h/1\tcat,dog\t/m/1,/m/2\t0.9,0.8\n"  # the layout of Image_Labels_Subset…


def rows_of(out: Path) -> list[tuple[str, list[str], int]]:
    return [(row["url"], row["captions"], row["source_row"]) for row in pq.read_table(out).to_pylist()]


def test_cc3m_is_caption_then_url_and_cc12m_the_reverse(tmp_path):
    (tmp_path / "3.tsv").write_text('"an unbalanced quote\thttp://h/1\na tab\tinside\thttp://h/2\nplain\thttp://h/3\n')
    (tmp_path / "12.tsv").write_text('http://h/1\t<PERSON> says "hi\nhttp://h/2\tplain\nhttp://h/1\tagain\n')
    tally = write_published("cc3m", tmp_path / "3.tsv", tmp_path / "3.parquet", expect=3)
    assert (tally.rows, tally.refused) == (3, 1)
    assert rows_of(tmp_path / "3.parquet") == [("http://h/1", ['"an unbalanced quote'], 1), ("http://h/3", ["plain"], 3)]
    write_published("cc12m", tmp_path / "12.tsv", tmp_path / "12.parquet", expect=0)
    assert rows_of(tmp_path / "12.parquet") == [("http://h/1", ['<PERSON> says "hi', "again"], 1),
                                                ("http://h/2", ["plain"], 2)]


def test_declips_json_lines(tmp_path):
    lines = [{"caption": "one", "filename": "a.jpg", "url": "http://h/1"}, {"caption": "", "filename": "b", "url": "http://h/2"}]
    (tmp_path / "v2.json").write_text("\n".join(map(json.dumps, lines)))
    tally = write_published("yfcc15m-v2", tmp_path / "v2.json", tmp_path / "v2.parquet", expect=2)
    assert tally.reasons == {"empty caption": (1, 2)}
    assert rows_of(tmp_path / "v2.parquet") == [("http://h/1", ["one"], 1)]


def metadata_line(number: int, photo: int, title: str, description: str, video: bool = False, columns: int = 25) -> str:
    cells = [str(number), str(photo), f"hash{photo}", *["x"] * 5, quote_plus(title), quote_plus(description), *["x"] * 6,
             f"http://h/{photo}.jpg", *["x"] * 7, str(int(video))]
    return "\t".join(cells if columns == 25 else [cells[1], *cells[3:]]) + "\n"


@pytest.mark.parametrize("columns", [25, 23])
def test_openais_list_is_joined_with_the_metadata(tmp_path, columns):
    told = [(0, 11, "not listed", "", False), (1, 22, "A <b>bold</b> & plain title", "Ümläut+plus\nsecond", False),
            (2, 33, "", "", False), (3, 44, "film", "", True), (4, 55, "last", "last", False)]
    lines = [metadata_line(*line, columns=columns) for line in told]
    (tmp_path / "part0").write_text("".join(lines[:3]))
    (tmp_path / "part1.bz2").write_bytes(bz2.compress("".join(lines[3:]).encode()))
    subset = [(4, 55), (1, 22), (2, 33), (3, 44), (9, 99), (1, 22)]
    (tmp_path / "subset.tsv").write_text("".join(f"{line}\t{photo}\th{photo}\n" for line, photo in subset) + "torn\n")
    parts = tmp_path / "part0", tmp_path / "part1.bz2"
    tally = write_yfcc15m_v1(tmp_path / "subset.tsv", parts, tmp_path / "v1.parquet", expect=7)
    assert rows_of(tmp_path / "v1.parquet") == [("http://h/55.jpg", ["last"], 1),
                                                ("http://h/22.jpg", ["A bold & plain title", "Ümläut+plus second"], 2)]
    assert tally.reasons == {"1 columns instead of 3": (1, 7), "photo id twice in the list": (1, 6), "empty caption": (1, 3),
                             "a video": (1, 4), "photo id not in the metadata": (1, 5)}


@pytest.mark.parametrize(("name", "content", "says"), [
    ("cc3m", LABELS * 3, "line 1: 5 columns instead of 2"),
    ("cc3m", "http://h/1\tcaption\n" * 3, "column 2 is no URL ('caption')"),
    ("cc12m", "caption\thttp://h/1\n" * 3, "column 1 is no URL ('caption')"),
    ("cc12m", "", "is empty"),
    ("yfcc15m-v2", '[{"url": "http://h/1", "caption": "x"}]\n', "expected one JSON object a line"),
    ("yfcc15m-v2", '{"image": "http://h/1", "text": "x"}\n', "no caption and url"),
    ("cc3m", "caption\thttp://h/1\n" * 3, "has 3 rows instead of 3,318,333 or 15,840: fetch it again, or say --expect"),
])
def test_other_files_are_refused(tmp_path, name, content, says):
    (tmp_path / "a.tsv").write_text(content)
    with pytest.raises(InputError) as caught:
        write_published(name, tmp_path / "a.tsv", tmp_path / "a.parquet")
    assert says in str(caught.value)
    assert "a.tsv" in str(caught.value)
    assert not (tmp_path / "a.parquet").exists()


def test_other_files_are_refused_as_v1(tmp_path):
    (tmp_path / "a.tsv").write_text("1\t22\thash\n")
    (tmp_path / "b.tsv").write_text("22\tx\n")
    for subset, metadata, says in (("b.tsv", "b.tsv", "expected line number ⇥ photo id"),
                                   ("a.tsv", "b.tsv", "2 columns, expected"), ("a.tsv", "none", "fetch yfcc100m_dataset")):
        with pytest.raises(InputError, match=says):
            write_yfcc15m_v1(tmp_path / subset, (tmp_path / metadata,), tmp_path / "a.parquet", 0)


@pytest.mark.parametrize("name", LISTS)
def test_the_commands(tmp_path, name):
    (tmp_path / "a.tsv").write_text("x\n")
    done = command("uniclip-data", "urls", name, tmp_path / "a.tsv", tmp_path / "a.parquet")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


ROWS = 100_001


def row_of(row: int) -> tuple[str, str, bool]:
    """URL, caption, and whether it is whole: every 1,000th has the first one's URL, every 997th no caption."""
    return f"http://h/{0 if row % 1_000 == 999 else row}.jpg", "" if row % 997 == 996 else f"text {row}", row % 991 != 990


def miniature(name: str, folder: Path, rows: list[tuple[str, str, bool]]) -> tuple[Path, tuple[Path, ...]]:
    """A list of these rows in the layout of the published one, and the metadata that it is joined with."""
    path = folder / name
    if name == "yfcc15m-v2":
        path.write_text("".join(json.dumps({"caption": text, "filename": "f", "url": url}) + "\n" if whole else "{'url'}\n"
                                for url, text, whole in rows))
    elif name != "yfcc15m-v1":
        path.write_text("".join("\t".join((text, url) if name == "cc3m" else (url, text)) + ("\n" if whole else "\tx\n")
                                for url, text, whole in rows))
    else:
        path.write_text("".join(f"{row}\t{row}\thash\n" if whole else "torn\n" for row, (*_, whole) in enumerate(rows)))
        lines = [metadata_line(row, row, text, "").replace(f"http://h/{row}.jpg", url)
                 for row, (url, text, _) in enumerate(rows)]
        np.random.default_rng(0).shuffle(lines)  # metadata are sorted in another way than the list
        parts = folder / "part0", folder / "part1.bz2"
        parts[0].write_text("".join(lines[:90_000]))
        parts[1].write_bytes(bz2.compress("".join(lines[90_000:]).encode(), 1))
        return path, parts
    return path, ()


@pytest.mark.parametrize("name", [*LISTS, "yfcc15m-v1"])
def test_miniatures_of_100_001_rows(tmp_path, name):
    rows = list(map(row_of, range(ROWS)))
    path, parts = miniature(name, tmp_path, rows)
    out = tmp_path / "urls.parquet"
    tally = write_yfcc15m_v1(path, parts, out, ROWS) if parts else write_published(name, path, out, ROWS)
    expected: dict[str, tuple[list[str], int]] = {}
    for number, (url, text, whole) in enumerate(rows, start=1):
        if text and whole:
            expected.setdefault(url, ([], number))[0].append(text)
    assert rows_of(out) == [(url, texts, row) for url, (texts, row) in expected.items()]
    merged = len(expected["http://h/0.jpg"][0]) - 1
    assert (tally.rows, tally.urls, tally.merged, tally.refused) == (ROWS, len(expected), merged, ROWS - len(expected) - merged)
    assert tally.reasons["empty caption"] == (sum(whole and not text for _, text, whole in rows), 997)
