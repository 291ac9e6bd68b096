"""Samples of tars that are read once, from beginning to end, local or remote; a read that stalls ends its tar."""

import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, BinaryIO, TypeVar

from pipeline.faults import driving, of_machine
from pipeline.members import Torn
from pipeline.reader import HTTP, ReadAhead, file_system
from pipeline.samples import Group, groups
from pipeline.tars import image_of, known_by, row_of

READ_BYTES = 2**20

T = TypeVar("T")
Sample = dict[str, Any]  # a row of the index (tars.ROWS) with "image", its bytes, and "known"


def _told(error: OSError, what: str) -> str:
    if of_machine(error):
        raise error
    return f"{'stalled' if isinstance(error, TimeoutError) else what}: {str(error) or type(error).__name__}"


class _Patient(io.RawIOBase):
    """A file whose every read is made on a thread; one that fails, or takes more than `timeout` seconds, raises Torn."""

    def __init__(self, ahead: ReadAhead, file: BinaryIO, timeout: float):
        self._ahead, self._file, self._timeout = ahead, file, timeout
        self.stalled = False

    def readable(self) -> bool:
        return True

    def _read(self, size: int) -> bytes:
        with driving():
            return self._file.read(size)

    def readinto(self, buffer: memoryview) -> int:
        try:
            data = answer(self._ahead, partial(self._read, len(buffer)), self._timeout)
        except OSError as error:
            self.stalled = isinstance(error, TimeoutError)
            raise Torn(_told(error, "cannot be read")) from None
        buffer[: len(data)] = data
        return len(data)


def answer(ahead: ReadAhead, read: Callable[[], T], timeout: float) -> T:
    """The result of one read, made on a thread. Raises what it raises, and TimeoutError."""
    result = ahead.answers(ahead.ask([read]), timeout)[0]
    if isinstance(result, Exception):
        raise result
    return result


def _open(url: str) -> BinaryIO:
    """webdataset's own opener is not used: it hands URLs to a shell."""
    with driving():
        return _opened(url)


def _opened(url: str) -> BinaryIO:
    system, path = file_system(url)
    file: Any = system.open(path, "rb")
    if url.startswith(HTTP) and file.size and file.size > file.blocksize:
        try:
            file.seek(-1, io.SEEK_END)
            file.read(1)
            file.seek(0)
        except ValueError:  # a server without ranges: one request for all of it
            return system.open(path, "rb", block_size=0)
    return file


def raw_samples(urls: Iterable[str], ahead: ReadAhead, timeout: float) -> Iterator[tuple[str, Group]]:
    """(url, group) of each tar in turn, as `samples.groups` has them. A tar that cannot be opened or stalls is left."""
    for url in urls:
        try:
            file = answer(ahead, partial(_open, url), timeout)
        except OSError as error:
            yield url, Group("", flaw=_told(error, "cannot be opened"))
            continue
        patient = _Patient(ahead, file, timeout)
        for group in groups(io.BufferedReader(patient, READ_BYTES)):  # pyright: ignore[reportArgumentType]
            yield url, group
        if not patient.stalled:  # closing would wait for the read
            file.close()


def parsed(group: Group) -> Sample:
    """What the index would say of this sample, its image's bytes, and what a takedown may know it by. Raises Unusable."""
    return {**row_of(group), "image": image_of(group), "known": known_by(group)}
