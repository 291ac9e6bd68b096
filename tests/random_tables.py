"""Random tables in four formats, with what must become of each row: known from how the row was made, not read back."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

ENDINGS = ("tsv", "csv", "jsonl", "parquet")
NOTHING = "empty caption"
NOT_TEXT = "caption is no text"
# A cell, and why its row is refused ("": it is not).
Cell = tuple[Any, str]
LINES = ["plain text", 'say "hi"', '"unbalanced', "ends'", "NA", "null", "nan", "1.5", "0012", "True", "a,b;c|d", "x" * 140_000,
         "Ümläut 日本語 😀", "\ufeffmark", "a\u2028b", "=1+1", "tail\\", "\\N", "#tag", "&amp;", "<b>bold</b>"]
SILENT = ["", "  ", "&nbsp;", "&amp;nbsp; &#8203;", "\u200b\u200d", "\u00a0", "\ufe0f", "\u2800", "\u00ad"]
BROKEN = [b"caf\xe9", b"\xff\xfe", b"\xed\xa0\x80x"]
FAULTY_LINES = [(b"not json", "not JSON"), (b'{"url": "http://h/1"', "not JSON"), (b"[1, 2]", "not a JSON object"),
                (b"null", "not a JSON object"), (b"", "blank line"),
                (b'{"url": "http://h/1", "caption": "\\ud800"}', "not UTF-8"),
                (b'{"url": "http://h/1", "caption": "caf\xe9"}', "not UTF-8")]


@dataclass
class Made:
    """A table on disk. lines, cells: of each whole row, (url, caption); rows: (line, url, captions or the reason) of all."""

    path: Path
    lines: list[int] = field(default_factory=list)
    cells: list[tuple[Any, Any]] = field(default_factory=list)
    rows: list[tuple[int, str, list[str] | str]] = field(default_factory=list)

    def add(self, line: int, url: Cell, caption: Cell) -> None:
        self.lines.append(line)
        self.cells.append((url[0], caption[0]))
        why = url[1] or caption[1]
        self.rows.append((line, one_url(url[0]) if not why else "", why or texts(caption[0])))

    def refused(self) -> list[tuple[int, str]]:
        return [(line, told) for line, _, told in self.rows if isinstance(told, str)]

    def urls(self) -> list[tuple[str, list[str], int]]:
        """URL, captions and first row, in the order of the table."""
        found: dict[str, tuple[list[str], int]] = {}
        for row, (_, url, told) in enumerate(self.rows, start=1):
            if not isinstance(told, str):
                captions, _ = found.setdefault(url, ([], row))
                captions += [text for text in told if text not in captions]
        return [(url, captions, row) for url, (captions, row) in found.items()]


def one_url(value: Any) -> str:
    """A usable URL cell without its fragment."""
    url = value[0] if isinstance(value, list) else value
    return (url.decode() if isinstance(url, bytes) else url).strip().split("#")[0]


def texts(value: Any) -> list[str]:
    """The captions of a usable cell."""
    values = [one.decode() if isinstance(one, bytes) else str(one) for one in (value if isinstance(value, list) else [value])
              if one is not None]
    return list(dict.fromkeys(text.strip() for text in values if text.strip() and text not in SILENT))


def url_cell(rng: np.random.Generator, lists: bool = False) -> Cell:
    """Few different URLs, so that some meet."""
    url = f"http://h/{rng.integers(0, 40)}.jpg"
    kinds: list[Cell] = [(url, "")] * 12 + [(f"{url}#{rng.integers(0, 9)}", ""), (f" {url} ", ""), ("", "empty url"),
                                            ("#top", "empty url"), (f"{url} {url}#2", "several URLs")]
    if lists:
        kinds = [([url], ""), ([f"{url}#a"], ""), ([url, "http://h/other.jpg"], "several URLs"), ([], "empty url")]
    return kinds[rng.integers(0, len(kinds))]


def line_cell(rng: np.random.Generator, breaks: bool) -> Cell:
    """A caption as text formats hold it."""
    kind = rng.random()
    if kind < 0.15:
        return SILENT[rng.integers(0, len(SILENT))], NOTHING
    if kind < 0.2:
        return BROKEN[rng.integers(0, len(BROKEN))], "not UTF-8"
    if kind < 0.203:
        return "y" * 1_000_001, "captions of more than 1,000,000 characters"
    text = f"{LINES[rng.integers(0, len(LINES))]} {rng.integers(0, 5)}"
    return (f"{text}\nsecond\r\nthird\tcell" if breaks and kind < 0.4 else text), ""


def raw(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def separated(rng: np.random.Generator, path: Path, rows: int) -> Made:
    """csv or tsv: ragged and blank lines between the rows, both line ends, with and without a byte order mark."""
    comma, made, file = path.suffix == ".csv", Made(path), io.BytesIO()
    separator, end = b"," if comma else b"\t", [b"\n", b"\r\n"][rng.integers(0, 2)]
    place = int(rng.integers(0, 2))  # of the url; the caption has the other
    header = [b"url", b"caption"] if place == 0 else [b"caption", b"url"]
    file.write(b"\xef\xbb\xbf" * int(rng.integers(0, 2)) + separator.join([*header, b"id"]) + end)
    for number in range(rows):
        line = 1 + file.getvalue().count(b"\n")  # a cell may have held some
        width = 3 if rng.random() < 0.9 else int(rng.integers(0, 5))
        url, caption = url_cell(rng), line_cell(rng, comma)
        cells = [raw(url[0]), raw(caption[0])][:: 1 if place == 0 else -1]
        cells = [*cells, b"%d" % number, b"more"][:width]
        if width != 3:
            cells = [b"z"] * width
            made.rows.append((line, "", f"{width} columns instead of 3" if width else "blank line"))
        else:
            made.add(line, url, caption)
        file.write(separator.join(map(quoted, cells) if comma else cells) + end)
    unended = made.rows[-1][2] != "blank line" and rng.integers(0, 2)
    path.write_bytes(file.getvalue().removesuffix(end) if unended else file.getvalue())
    return made


def quoted(cell: bytes) -> bytes:
    return b'"' + cell.replace(b'"', b'""') + b'"' if set(cell) & set(b'",\r\n') else cell


def json_lines(rng: np.random.Generator, path: Path, rows: int) -> Made:
    made, file = Made(path), [b"\xef\xbb\xbf" * int(rng.integers(0, 2))]
    for line in range(1, rows + 1):
        if line > 1 and rng.random() < 0.1:
            text, why = FAULTY_LINES[rng.integers(0, len(FAULTY_LINES))]
            made.rows.append((line, "", why))
        else:
            url, caption = url_cell(rng, lists=rng.random() < 0.2), any_cell(rng)
            made.add(line, url, caption)
            text = raw(json.dumps({"url": url[0], "caption": caption[0], "id": line}, ensure_ascii=bool(rng.integers(0, 2))))
        file.append(text + b"\n")
    path.write_bytes(b"".join(file))
    return made


def any_cell(rng: np.random.Generator) -> Cell:
    """A caption as JSON holds it."""
    kinds: list[Cell] = [({"en": "a cat"}, NOT_TEXT), (True, NOT_TEXT), (["a", ["b", "c"]], NOT_TEXT), (["a", False], NOT_TEXT),
                         (None, NOTHING), ([], NOTHING), (["", "&nbsp;"], NOTHING), (2024, ""), (["a", None, "b", "a", ""], ""),
                         (["&nbsp;", "one"], "")]
    while rng.random() < 0.6:
        text, why = line_cell(rng, breaks=True)
        if why != "not UTF-8":
            return text, why
    return kinds[rng.integers(0, len(kinds))]


PARQUET: dict[str, tuple[pa.DataType, str]] = {  # type of the caption column → why its rows are refused
    "string": (pa.string(), ""), "large": (pa.large_string(), ""), "bytes": (pa.binary(), ""),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), ""), "list": (pa.list_(pa.string()), ""), "int": (pa.int64(), ""),
    "struct": (pa.struct([("en", pa.string())]), NOT_TEXT), "map": (pa.map_(pa.string(), pa.string()), NOT_TEXT),
    "nested": (pa.list_(pa.list_(pa.string())), NOT_TEXT), "bool": (pa.bool_(), NOT_TEXT),
    "time": (pa.timestamp("us"), NOT_TEXT)}


def parquet(rng: np.random.Generator, path: Path, rows: int) -> Made:
    made, kind = Made(path), list(PARQUET)[rng.integers(0, len(PARQUET))]
    lists = rng.random() < 0.2
    for row in range(1, rows + 1):
        made.add(row, url_cell(rng, lists), parquet_cell(rng, kind))
    values = [caption for _, caption in made.cells]
    broken = any(isinstance(value, bytes) for value in values) and kind != "bytes"
    column = pa.array([raw(v) for v in values], pa.binary()) if broken else pa.array(values, PARQUET[kind][0])
    if broken:  # as writers that check nothing store it
        column = pa.Array.from_buffers(pa.string(), rows, column.buffers())
    table = pa.table({"id": range(rows), "caption": column, "url": pa.array([url for url, _ in made.cells])})
    pq.write_table(table, path, row_group_size=int(rng.integers(1, rows + 1)), data_page_size=int(rng.integers(64, 4_096)),
                   data_page_version=["1.0", "2.0"][rng.integers(0, 2)], use_dictionary=bool(rng.integers(0, 2)))
    return made


def parquet_cell(rng: np.random.Generator, kind: str) -> Cell:
    text, why = line_cell(rng, breaks=True)
    if kind in ("string", "bytes") or kind in ("large", "dictionary") and not isinstance(text, bytes):
        return text if kind != "bytes" else raw(text), why
    other: dict[str, Cell] = {"int": (7, ""), "list": (["a", None, "b"], ""), "struct": ({"en": "cat"}, NOT_TEXT),
                              "map": ([("k", "v")], NOT_TEXT), "nested": ([["a"]], NOT_TEXT), "bool": (True, NOT_TEXT),
                              "time": (10**18, NOT_TEXT)}  # the year 33658
    return other.get(kind, ("other", ""))


MAKERS = {"tsv": separated, "csv": separated, "jsonl": json_lines, "parquet": parquet}


def table(seed: int, folder: Path) -> Made:
    """The random table of this number."""
    rng, ending = np.random.default_rng(seed), ENDINGS[seed % len(ENDINGS)]
    return MAKERS[ending](rng, folder / f"t{seed}.{ending}", int(rng.integers(1, 120)))


def read_by_others(made: Made) -> Iterator[tuple[Any, Any]]:
    """(url, caption) of each whole row, as pandas or pyarrow reads the file."""
    if made.path.suffix == ".parquet":
        columns = pq.read_table(made.path, columns=["url", "caption"])
        caption = columns["caption"]
        caption = caption.cast(pa.binary()) if caption.type in (pa.string(), pa.large_string()) else caption
        yield from zip(columns["url"].to_pylist(), caption.cast(pa.int64()).to_pylist() if caption.type == pa.timestamp("us")
                       else caption.to_pylist(), strict=True)
    elif made.path.suffix == ".jsonl":
        text = b"\n".join(raw for line, raw in enumerate(made.path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
                          if line in made.lines)
        found = pd.read_json(io.BytesIO(text), lines=True, dtype=False, convert_dates=False) if text else pd.DataFrame()
        for url, caption in found[["url", "caption"]].to_numpy().tolist() if text else ():
            yield url, None if isinstance(caption, float) and caption != caption else caption
    else:
        form: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE, "lineterminator": "\n"}
        found = pd.read_csv(made.path, header=None, names=list(range(5)), dtype=str, keep_default_na=False,
                            encoding="utf-8-sig", encoding_errors="surrogateescape", skip_blank_lines=False,
                            **(form if made.path.suffix == ".tsv" else {}))
        names = [str(name) for name in found.iloc[0]]
        for cells in found.iloc[1:].to_numpy().tolist():
            if cells[2] and not cells[3]:  # three cells: pandas fills short rows up with nothing, and no id is empty
                yield tuple(cells[names.index(name)].encode("utf-8", "surrogateescape") for name in ("url", "caption"))
