"""Numbers and names of each sample, as statistics and filters need them: the index's columns and what follows from them."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.console import InputError
from pipeline.index import Index
from pipeline.merging import rows_between
from pipeline.schema import INDEX_BATCH_ROWS


def _lengths(table: pa.Table) -> np.ndarray:
    return np.array([max(map(len, texts)) for texts in table["captions"].to_pylist()])


def _words(table: pa.Table) -> np.ndarray:
    return np.array([max(len(text.split()) for text in texts) for texts in table["captions"].to_pylist()])


def _plain(name: str) -> Callable[[pa.Table], np.ndarray]:
    return lambda table: table[name].to_numpy()


def _names(name: str) -> Callable[[pa.Table], np.ndarray]:
    return lambda table: np.array(table[name].cast(pa.string()).to_pylist(), object)


def _sides(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    width, height = table["width"].to_numpy(), table["height"].to_numpy()
    return np.minimum(width, height), np.maximum(width, height)


def script_of(text: str) -> str:
    """The writing system that most letters belong to, as Unicode names it: LATIN, CYRILLIC, CJK, …; cheap, no model."""
    counts = Counter(unicodedata.name(letter, "?").partition(" ")[0] for letter in text if letter.isalpha())
    return counts.most_common(1)[0][0].lower() if counts else "none"


def languages_of(texts: list[str]) -> list[str]:
    """ISO 639-1 codes by py3langid. Raises InputError where it is not installed."""
    try:
        from py3langid import classify
    except ModuleNotFoundError:
        raise InputError("language needs py3langid, which is not installed: pip install 'uniclip[language]'") from None
    return [str(classify(text)[0]) for text in texts]


def _joined(table: pa.Table) -> list[str]:
    return [" ".join(texts) for texts in table["captions"].to_pylist()]


# Name → (what it is, how it is found). Of several captions the longest counts; script and language are of all.
COLUMNS: dict[str, tuple[str, Callable[[pa.Table], np.ndarray]]] = {
    "width": ("pixels, upright", _plain("width")),
    "height": ("pixels, upright", _plain("height")),
    "side": ("pixels of the shorter side", lambda table: _sides(table)[0]),
    "aspect": ("longer side / shorter side", lambda table: _sides(table)[1] / np.maximum(_sides(table)[0], 1)),
    "size": ("bytes of the image file", _plain("size")),
    "plain": ("1 for an upright 8-bit JPEG", lambda table: np.array(table["plain"].to_pylist()).astype(int)),
    "captions": ("how many", lambda table: np.array(list(map(len, table["captions"].to_pylist())))),
    "words": ("of the longest caption", _words),
    "characters": ("of the longest caption", _lengths),
    "script": ("latin, cyrillic, cjk, …", lambda table: np.array(list(map(script_of, _joined(table))), object)),
    "language": ("ISO 639-1 code, by py3langid", lambda table: np.array(languages_of(_joined(table)), object)),
    "source": ("name", _names("source")),
    "shard": ("path of the tar", _names("shard")),
    "key": ("WebDataset key", _names("key")),
    "sample_id": ("63-bit number", _plain("sample_id")),
    "group": ("duplicate group, −1 = alone", _plain("group")),
}


def tables(index: Index) -> Iterator[pa.Table]:
    """The index, one record batch at a time."""
    for start in range(0, len(index), INDEX_BATCH_ROWS):
        yield rows_between(index, start, min(start + INDEX_BATCH_ROWS, len(index)))


def gathered(index: Index, names: list[str]) -> dict[str, Any]:
    """These columns of the whole index."""
    parts = [{name: COLUMNS[name][1](table) for name in names} for table in tables(index)]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
