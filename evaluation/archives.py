"""The files below a folder, those inside its tars and zips too, so that a set can be read packed or unpacked."""

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pipeline.console import InputError

TAR_ENDINGS, ZIP_ENDING = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), ".zip"

File = tuple[str, Callable[[], bytes]]  # path with /, and its bytes when asked for, before the next file is asked for


def files(source: Path) -> Iterator[File]:
    """Every file, folders in the order of their names, archives in their own order.

    A member's path does not name its archive: packed and unpacked look alike to whoever matches the ends of paths.
    Raises InputError for a damaged archive.
    """
    for path in [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file()):
        if _is_archive(path.name):
            with path.open("rb") as stream:
                yield from _members(path.name, stream, str(path))
        else:
            yield path.relative_to(source).as_posix() if path != source else path.name, path.read_bytes


def _is_archive(name: str) -> bool:
    return name.lower().endswith((*TAR_ENDINGS, ZIP_ENDING))


def _members(name: str, stream: IO[bytes], where: str) -> Iterator[File]:
    """The members of an archive, and of archives in it (ImageNet's training tar holds a tar a class)."""
    opened = _zip if name.lower().endswith(ZIP_ENDING) else _tar
    try:
        for member, read in opened(stream):
            if _is_archive(member):
                yield from _members(member, io.BytesIO(read()), f"{where}, {member}")
            else:
                yield member, read
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise InputError(f"{where} cannot be read ({error}): fetch it again") from None


def _zip(stream: IO[bytes]) -> Iterator[File]:
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, lambda info=info: archive.read(info)


def _tar(stream: IO[bytes]) -> Iterator[File]:
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            if member.isfile():
                yield member.name.removeprefix("./"), lambda member=member: _extracted(archive, member)


def _extracted(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""
