"""The members of a tar in its order, from a file that is read once from beginning to end.

`tarfile` reads single headers here, the walk is ours: TarFile loops on negative sizes, holds headers of any length in memory,
and stops without a word at a damaged header and at an end mark that another tar follows.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER = 2**20  # bytes of an extended header; real ones hold a name and a few attributes
MAX_NAME = 4096  # characters; no file system has longer paths
_PIECE = 2**20
_ZEROS = bytes(BLOCK)
_EMPTY = {tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE}
_PAX = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE}
_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_USED = re.compile("path|linkpath|size|GNU.sparse.(name|major|map|numblocks)")  # others are many and of no use here
_FOREIGN = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "Zstandard", b"PK\x03\x04": "zip"}


class Torn(Exception):
    """A tar gives no more members; the message says why, its class first."""


@dataclass(frozen=True)
class Member:
    """One member. start: of its first header; offset: of its bytes; stop: of the next header.

    flaw: why the bytes at its place are not the file's, as `class: detail`; empty when they are.
    """

    name: str
    start: int
    offset: int
    size: int
    stop: int
    folder: bool
    flaw: str


def shown(text: str) -> str:
    """A foreign name, fit for one line of a terminal or a report."""
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class Tar:
    """Iterate once over the members of a tar, and over those of a tar that is joined to it; `read` gives the last one's bytes.

    inside: whether the last member's bytes were being read when Torn came.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self._at, self._globals = file, 0, {}
        local = isinstance(getattr(file, "raw", None), io.FileIO)
        self._end = os.fstat(file.fileno()).st_size if local else None  # where a file on disk ends: it need not be read through
        self.inside = False

    def __iter__(self) -> Iterator[Member]:
        """Raises Torn where the tar is damaged, or ends without an end mark."""
        ended = False
        while True:
            start, block = self._at, self._some(BLOCK)
            if block == _ZEROS:
                ended = True
            elif ended and not block.strip(b"\0"):
                return
            else:
                member = self._member(start, block, ended)
                ended = False
                self.inside = True
                yield member
                self._pass(member)

    def read(self, member: Member) -> bytes:
        """The bytes of the member that came last. Raises Torn."""
        data = self._bytes(member.size)
        self.inside = False
        return data

    def _pass(self, member: Member) -> None:
        self._skip(member.offset + member.size)
        self.inside = False
        self._some(member.stop - self._at)  # padding; where it is missing, the next header is

    def _skip(self, stop: int) -> None:
        """Go on to `stop`. Raises Torn where the tar ends before."""
        if self._end is not None and stop - self._at > _PIECE:
            self._at = self._file.seek(min(stop, self._end))
        while self._at < stop:
            self._bytes(min(stop - self._at, _PIECE))

    def _some(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end of the file."""
        pieces, left = [], size
        while left > 0 and (piece := self._file.read(min(left, _PIECE))):
            pieces.append(piece)
            left -= len(piece)
        self._at += size - left
        return b"".join(pieces)

    def _bytes(self, size: int) -> bytes:
        if len(data := self._some(size)) < size:
            raise Torn("truncated tar")
        return data

    def _header(self, start: int, block: bytes, ended: bool = False) -> tarfile.TarInfo:
        if len(block) < BLOCK and start and not ended:
            raise Torn("truncated tar")
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            pass
        if not start:
            raise Torn(f"not a tar: {_foreign(block)}")
        what = "its end mark is followed by what is no tar" if ended else "no header where the next member should begin"
        raise Torn(f"damaged tar: {what}, at byte {start:,}; the rest is not read")

    def _member(self, start: int, block: bytes, ended: bool) -> Member:
        told, flaw, header = dict(self._globals), "", self._header(start, block, ended)
        while header.type in _PAX or header.type in _LONG:
            found = self._extension(header)
            flaw = flaw if found is not None else "damaged header: PAX records or a long name that cannot be read"
            if header.type == tarfile.XGLTYPE:
                self._globals |= found or {}
            told |= found or {}
            block = self._bytes(BLOCK)
            header = self._header(self._at - BLOCK, block)
        if header.type == tarfile.GNUTYPE_SPARSE and block[482]:
            while self._bytes(BLOCK)[504]:
                pass
        name = told.get("GNU.sparse.name") or told.get("path") or header.name
        size, wrong = _size(header, told.get("size"))
        stop = self._at + -(-size // BLOCK) * BLOCK
        flaw = flaw or wrong or _unlike_a_file(header, told) or (
            f"damaged header: a name of {len(name):,} characters" if len(name) > MAX_NAME else "")
        what, _, detail = flaw.partition(": ")
        return Member(name[:MAX_NAME], start, self._at, size, stop, header.isdir(),
                      flaw and f"{what}: {shown(name)} has {detail}")

    def _extension(self, header: tarfile.TarInfo) -> dict[str, str] | None:
        """What an extended header tells of the next member. None where it cannot be read."""
        stop = self._at + -(-max(header.size, 0) // BLOCK) * BLOCK
        data = self._bytes(header.size) if 0 <= header.size <= MAX_HEADER else None
        self._skip(stop)
        if data is None:
            return None
        if header.type in _LONG:
            return {_LONG[header.type]: data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
        return _records(data)


def _records(data: bytes) -> dict[str, str] | None:
    """The lines `LENGTH KEY=VALUE` of a PAX header that are of use. None where one is malformed."""
    found, at = {}, 0
    while at < len(data) and data[at]:  # some writers fill up with zeros
        length = re.compile(rb"(\d{1,7}) ").match(data, at)
        end = at + int(length[1]) if length else 0
        key, equals, value = data[length.end():end - 1].partition(b"=") if length else (b"", b"", b"")
        if not equals or not at < end <= len(data) or data[end - 1:end] != b"\n":
            return None
        if _USED.fullmatch(key := key.decode("utf-8", "surrogateescape")):
            found[key] = value.decode("utf-8", "surrogateescape")
        at = end
    return found


def _size(header: tarfile.TarInfo, told: str | None) -> tuple[int, str]:
    """How many bytes follow, and what is wrong about it."""
    if header.type in _EMPTY:
        return 0, ""
    size, wrong = header.size, ""
    if told is not None and re.fullmatch("[0-9]{1,19}", told):
        size = int(told)
    elif told is not None:
        wrong = f"damaged header: a size of {shown(told)}"
    return (size, wrong) if size >= 0 else (0, f"damaged header: a size of {size}")


def _unlike_a_file(header: tarfile.TarInfo, told: dict[str, str]) -> str:
    link = shown(told.get("linkpath") or header.linkname)
    if header.type == tarfile.LNKTYPE:
        return f"hard link: the bytes of {link}; write the tar with --hard-dereference"
    if header.type == tarfile.SYMTYPE:
        return f"symbolic link: the bytes of {link}; write the tar with --dereference"
    if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in told):
        return "sparse file: holes that are not stored; write the tar without --sparse"
    ordinary = header.isdir() or header.type in tarfile.REGULAR_TYPES
    return "" if ordinary else "special file: the type of a device, a pipe or the like"


def _foreign(block: bytes) -> str:
    """What a file that is no tar seems to be."""
    for signature, name in _FOREIGN.items():
        if block.startswith(signature):
            return f"it is compressed with {name}; unpack it"
    if block.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; run `git lfs pull`"
    if block.lstrip()[:1] == b"<":
        return "it is a web page; fetch the tar again"
    return f"it begins with {block[:12]!r}; fetch it again" if block else "it is empty; fetch it again"
