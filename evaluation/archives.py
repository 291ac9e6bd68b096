"""The files below a folder, those inside its tars and zips too, so that a set can be read packed or unpacked.

Nothing that an archive claims can fill memory or disk: members, depth, and what comes out in all are bounded.
"""

import bz2
import gzip
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from pipeline.console import InputError
from pipeline.members import Member, Tar, Torn

TAR_ENDINGS, ZIP_ENDING = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), ".zip"
_MEMBER_BYTES = 512 << 20  # the largest that is read whole is a class of ImageNet
_DEEPEST = 2  # archives in an archive; ImageNet's and Caltech's hold others, which hold none
_GROWTH, _AT_LEAST = 100, 1 << 30  # what comes out: times the archive's size, and bytes beside that
_OPENERS: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_UNREADABLE = (Torn, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, ValueError,
               OverflowError, RuntimeError)  # zipfile raises the last for a password or an unknown method

_FOREIGN = "this is not the original archive, fetch it again"

File = tuple[str, Callable[[], bytes]]  # path with /, and its bytes when asked for, before the next file is asked for


def files(source: Path) -> Iterator[File]:
    """Every file, folders in the order of their names, archives in their own order.

    A member's path does not name its archive: packed and unpacked look alike to whoever matches the ends of paths.
    Raises InputError for a damaged archive, and when the bytes of a link or a sparse member are asked for.
    """
    for path in [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file()):
        if _is_archive(path.name):
            with path.open("rb") as stream:
                yield from _members(path.name, stream, str(path), _Budget(path.stat().st_size))
        else:
            yield path.relative_to(source).as_posix() if path != source else path.name, path.read_bytes


def _is_archive(name: str) -> bool:
    return name.lower().endswith((*TAR_ENDINGS, ZIP_ENDING))


class _Budget:
    """How many bytes may still come out of an archive on disk; a bomb unpacks to a thousand times its size."""

    def __init__(self, packed: int):
        self.left = _GROWTH * packed + _AT_LEAST

    def spend(self, size: int, where: str) -> None:
        self.left -= size
        if self.left < 0:
            raise InputError(f"{where}: more than {_GROWTH} times the archive's size is unpacked: {_FOREIGN}")


def _members(name: str, stream: IO[bytes], where: str, budget: _Budget, depth: int = 0) -> Iterator[File]:
    """The members of an archive, and of archives in it (ImageNet's training tar holds a tar a class)."""
    if depth > _DEEPEST:
        raise InputError(f"{where}: archives in archives, {depth} deep: {_FOREIGN}")
    opened = _zip if name.lower().endswith(ZIP_ENDING) else _tar
    with _readable(where):
        for member, size, start in opened(stream):
            place = f"{where}, {member}"
            budget.spend(size, place)  # also for what is passed over: a tar is unpacked to its end
            read = partial(_read, start, size, place)
            if _is_archive(member):
                yield from _members(member, io.BytesIO(read()), place, budget, depth + 1)
            else:
                yield member, read


def _read(start: Callable[[], IO[bytes] | None], size: int, where: str) -> bytes:
    if size > _MEMBER_BYTES:
        raise InputError(f"{where} has {size:,} bytes when unpacked: {_FOREIGN}")
    with _readable(where), start() or io.BytesIO() as file:
        return file.read(size)  # not more, whatever the stream holds


@contextmanager
def _readable(where: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{where} cannot be read ({error}): fetch it again") from None


def _zip(stream: IO[bytes]) -> Iterator[tuple[str, int, Callable[[], IO[bytes] | None]]]:
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, info.file_size, partial(archive.open, info)


def _tar(stream: IO[bytes]) -> Iterator[tuple[str, int, Callable[[], IO[bytes] | None]]]:
    opener = _OPENERS.get(stream.read(2))
    stream.seek(0)
    tar = Tar(opener(stream) if opener else stream)
    for member in tar:
        if not member.folder:
            yield member.name.removeprefix("./"), member.size, partial(_file, tar, member)


def _file(tar: Tar, member: Member) -> IO[bytes]:
    if member.flaw:
        raise Torn(member.flaw)
    return io.BytesIO(tar.read(member))
