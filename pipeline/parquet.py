"""Parquet as we write and read it: checksums of every page, which other programs check too, and of the whole file.

The latter stands among the key-value pairs of the footer, where every reader passes over it.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.console import InputError
from pipeline.files import replacing
from pipeline.seals import UNREADABLE, Damaged, crc32

_KEY = b"uniclip.crc32"
_MARK = b"crc32 of this file, with zeros here: "
_BLANK = b"0" * 8
_TAIL = 8  # bytes of the footer's length and the magic


@contextmanager
def writing(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer of a file that takes its name when the block ends well."""
    with replacing(path) as temporary:
        with pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer:
            yield writer
            writer.add_key_value_metadata({_KEY: _MARK + _BLANK})
        _seal(temporary)


def write(path: Path, table: pa.Table) -> None:
    """A whole table."""
    with writing(path, table.schema) as writer:
        writer.write_table(table)


def _seal(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        at = data.rfind(_MARK) + len(_MARK)
        data[at:at + 8] = b"%08x" % _sum(data, at)


def _sum(data: mmap.mmap | bytes, at: int) -> int:
    with memoryview(data) as view, view[:at] as head, view[at + 8:] as tail:
        return crc32(tail, crc32(_BLANK, crc32(head)))


def _footer_at(data: mmap.mmap | bytes) -> int:
    return max(len(data) - _TAIL - int.from_bytes(data[-_TAIL:-4], "little"), 0)


def _checked(data: mmap.mmap | bytes) -> bool | None:
    """Whether the footer's checksum matches; None where it holds none.

    Strangers' captions may look like one, also in the footer, which holds the least and the greatest.
    """
    found = data.rfind(_MARK, _footer_at(data))
    at = found + len(_MARK)
    return data[at:at + 8] == b"%08x" % _sum(data, at) if found >= 0 else None


def read(source: Path | bytes) -> tuple[pq.ParquetFile, bool]:
    """A file that was checked as a whole, and whether it has a checksum of ours; else its pages are, as they are read.

    Raises what is in UNREADABLE.
    """
    if isinstance(source, bytes):
        sealed = _checked(source)
    else:
        with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            sealed = _checked(data)
    file = pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source, page_checksum_verification=True)
    told = file.metadata.metadata or {}
    if not sealed and (_told(told) or sealed is False and not told):
        raise Damaged
    return file, bool(sealed)


def _told(pairs: dict[bytes, bytes]) -> bool:
    """Whether the footer's pairs tell of a checksum, or did before a bit of them changed."""
    return any(_nearly(key) or value.startswith(_MARK) for key, value in pairs.items())


def _nearly(key: bytes) -> bool:
    """Not so for `uniclip.schema`, which files without a checksum have."""
    cut = bool(key) and _KEY.startswith(key)  # a bit of its length
    return cut or len(key) == len(_KEY) and sum(a != b for a, b in zip(key, _KEY, strict=True)) == 1


def opened(path: Path, cure: str) -> pq.ParquetFile:
    """Raises InputError for a file that cannot be read."""
    try:
        return read(path)[0]
    except UNREADABLE as error:
        raise InputError(f"{path} is no Parquet file, or it is damaged ({error}): {cure}") from None
