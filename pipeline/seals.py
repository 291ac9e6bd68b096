"""Checksums that our files carry themselves, so that a flipped bit is found where a file is read.

JSON objects and lines end in a `crc32` of the text before it; binary files end in one, or hold it where their format has
room (see arrows.py and parquet.py). Files without are read as they are: older versions wrote them, or somebody else.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.console import InputError
from pipeline.files import replacing

UNREADABLE = (OSError, pa.ArrowException, ValueError, KeyError, IndexError)  # what reading damaged bytes may raise
_PART = 1 << 20
_ENTRY = b', "crc32": "'  # then 8 hexadecimal digits and the end of the object
_KEY = slice(3, 8)  # its letters; the rest is in other people's JSON too
_TRAILER = b"uniclip-crc32:"  # then 8 hexadecimal digits and the end of the file
_DIGITS = 8


class Damaged(ValueError):
    """The bytes are not those that were written."""

    def __init__(self, what: str = "it does not match its checksum"):
        super().__init__(what)


def crc32(data: bytes | memoryview, start: int = 0) -> int:
    """In parts, so that a file may be longer than memory."""
    view = memoryview(data).cast("B")
    for at in range(0, len(view), _PART):
        start = zlib.crc32(view[at:at + _PART], start)
    return start


def _hex(data: bytes | memoryview) -> bytes:
    return b"%08x" % crc32(data)


def _much_like(found: bytes, mark: bytes) -> bool:
    """A flipped bit must not make a sealed file look like one that never was."""
    return len(found) == len(mark) and sum(a == b for a, b in zip(found, mark, strict=True)) > len(mark) // 2


def sealed_json(value: dict[str, Any], **style: Any) -> bytes:
    """A JSON object that is not empty, with a `crc32` of its text as the last entry. style: of json.dumps."""
    head = json.dumps(value, **style).encode()[:-1].rstrip()
    return head + _ENTRY + _hex(head) + b'"}'


def is_sealed(text: bytes) -> bool:
    """Whether JSON ends, or ended before it was damaged, in its crc32."""
    at = -len(_ENTRY) - _DIGITS - 2
    ends = [text[at + slip:][:len(_ENTRY)] for slip in (0, -1)]  # one byte of rubbish behind it
    return any(_much_like(end, _ENTRY) and _much_like(end[_KEY], _ENTRY[_KEY]) for end in ends)


def open_json(text: bytes) -> dict[str, Any]:
    """What `sealed_json` was given; of JSON without a crc32, too. Raises Damaged, ValueError for what is no JSON object."""
    text = text.removesuffix(b"\n")
    if sealed := is_sealed(text):
        head = text[:-len(_ENTRY) - _DIGITS - 2]
        if text[len(head):] != _ENTRY + _hex(head) + b'"}':
            raise Damaged("it does not match its crc32, which has to go when somebody changes it by hand")
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    if sealed:
        del value["crc32"]
    return value


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """Indented, for people."""
    with replacing(path) as temporary:
        temporary.write_bytes(sealed_json(value, indent=2, ensure_ascii=False) + b"\n")


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """Raises InputError for a damaged file, OSError where there is none."""
    try:
        return open_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): {cure}") from None


def read_lines(path: Path, cure: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, nothing where it is absent; a last line torn by a kill is left out.

    A line without a crc32 is taken: an older version wrote it, or somebody by hand. Raises InputError naming a damaged line.
    """
    *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines + [torn] * is_sealed(torn), 1):
        try:
            value = open_json(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number} is damaged ({error}): {cure}") from None
        yield value


def with_trailer(data: bytes) -> bytes:
    """Binary data with its checksum behind it."""
    return data + _TRAILER + _hex(data)


def has_trailer(data: bytes) -> bool:
    """Or had one before it was damaged."""
    return _much_like(data[-len(_TRAILER) - _DIGITS:-_DIGITS], _TRAILER)


def without_trailer(data: bytes) -> bytes:
    """What `with_trailer` was given. Raises Damaged, also for data without a checksum."""
    head = data[:-len(_TRAILER) - _DIGITS]
    if data[len(head):] != _TRAILER + _hex(head):
        raise Damaged
    return head
