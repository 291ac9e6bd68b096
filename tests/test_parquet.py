"""Parquet files of strangers whose text looks like our checksum, and our own with a bit flipped."""

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import parquet
from pipeline.schema import URLS
from pipeline.seals import UNREADABLE

MARK = "crc32 of this file, with zeros here: 12345678"


@pytest.mark.parametrize("caption", [f"see {MARK} ok", MARK, f"uniclip.crc32\x18\x2d{MARK}"])
def test_a_stranger_s_text_is_no_checksum(tmp_path: Path, caption: str) -> None:
    """In pages, and in the footer, which holds the least and the greatest value of each column."""
    table = pa.table({"url": ["http://x/a.jpg"], "caption": [caption]})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    for source in (tmp_path / "a.parquet", (tmp_path / "a.parquet").read_bytes()):
        file, sealed = parquet.read(source)
        assert not sealed and file.read().equals(table)
    parquet.write(tmp_path / "ours.parquet", table)
    file, sealed = parquet.read(tmp_path / "ours.parquet")
    assert sealed and file.read().equals(table)


def test_a_table_that_an_older_version_wrote_is_read(tmp_path: Path) -> None:
    """With our schema's name in it, and no checksum."""
    table = URLS.empty_table()
    pq.write_table(table, tmp_path / "urls.parquet")
    file, sealed = parquet.read(tmp_path / "urls.parquet")
    assert not sealed and file.read().equals(table)


def test_each_flipped_bit_of_our_own_is_found(tmp_path: Path) -> None:
    parquet.write(tmp_path / "a.parquet", pa.table({"caption": [MARK]}))
    data = (tmp_path / "a.parquet").read_bytes()
    for at, bit in itertools.product(range(len(data)), range(8)):
        with pytest.raises(UNREADABLE):
            parquet.read(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:])
