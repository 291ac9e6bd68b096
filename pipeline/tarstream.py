"""Samples of tars that are read once, from beginning to end, local or remote; a read that stalls ends its tar."""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, BinaryIO, TypeVar

from webdataset.tariterators import base_plus_ext, tar_file_iterator

from pipeline.faults import driving, of_machine
from pipeline.reader import HTTP, ReadAhead, file_system
from pipeline.tars import IMAGE_SUFFIXES, Group, known_by, row_of

READ_BYTES = 2**20

T = TypeVar("T")
Sample = dict[str, Any]  # a row of the index (tars.ROWS) with "image", its bytes, and "known"


class _Blocks:
    """A file as tarfile reads it, block after block: the `last` one is where it stopped."""

    def __init__(self, file: BinaryIO):
        self._file, self.last = file, b""

    def read(self, _: int = -1) -> bytes:
        self.last = self._file.read(tarfile.BLOCKSIZE)
        return self.last


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member; empty where it belongs to no sample."""
    key, suffix = base_plus_ext(name)
    return (key, suffix.lower()) if key and suffix is not None else ("", "")


def tar_samples(file: BinaryIO) -> Iterator[Sample]:
    """webdataset's samples of one tar, __key__ and the members' bytes, cut into samples as `tars.groups` does it.

    __broken__ says why the last one is not whole, or, under an empty key, why the tar is not.
    """
    blocks, begun, sample, broken = _Blocks(file), [""], None, ""
    try:
        for member in tar_file_iterator(blocks, select_files=lambda name: not begun.append(name)):  # pyright: ignore
            key, suffix = _split(begun.pop())
            if not key:
                continue
            if sample is None or sample["__key__"] != key or suffix in sample:
                if sample:
                    yield sample
                sample = {"__key__": key}
            sample[suffix] = member["data"]
    except (tarfile.TarError, ValueError, OverflowError):
        pass  # a torn or foreign header, or a member cut short: said below
    except OSError as error:
        broken = _told(error, "cannot be read")
    key, suffix = _split(begun[-1])
    if key:  # its data did not come
        if sample and (sample["__key__"] != key or suffix in sample):
            yield sample
            sample = None
        sample, broken = sample or {"__key__": key}, broken or "truncated tar"
    if not broken and blocks.last != bytes(tarfile.BLOCKSIZE):
        if sample:
            yield sample
        sample, broken = {"__key__": ""}, "truncated tar" if sample else "not a tar"
    if sample or broken:
        yield {"__key__": "", **(sample or {}), "__broken__": broken}


def _told(error: OSError, what: str) -> str:
    if of_machine(error):
        raise error
    words = str(error).partition(" @ ")[0] or type(error).__name__  # webdataset adds the file object
    return f"{'stalled' if isinstance(error, TimeoutError) else what}: {words}"


class _Patient(io.RawIOBase):
    """A file whose every read, made on a thread, raises TimeoutError after `timeout` seconds."""

    def __init__(self, ahead: ReadAhead, file: BinaryIO, timeout: float):
        self._ahead, self._file, self._timeout = ahead, file, timeout

    def readable(self) -> bool:
        return True

    def _read(self, size: int) -> bytes:
        with driving():
            return self._file.read(size)

    def readinto(self, buffer: memoryview) -> int:
        data = answer(self._ahead, partial(self._read, len(buffer)), self._timeout)
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


def raw_samples(urls: Iterable[str], ahead: ReadAhead, timeout: float) -> Iterator[Sample]:
    """`tar_samples` of each tar in turn, with its __url__. A tar that cannot be opened or stalls is left."""
    for url in urls:
        try:
            file = answer(ahead, partial(_open, url), timeout)
        except OSError as error:
            yield {"__key__": "", "__url__": url, "__broken__": _told(error, "cannot be opened")}
            continue
        sample: Sample = {}
        for sample in tar_samples(io.BufferedReader(_Patient(ahead, file, timeout), READ_BYTES)):
            yield {**sample, "__url__": url}
        if not sample.get("__broken__", "").startswith("stalled"):  # closing would wait for the read
            file.close()


def parsed(sample: Sample) -> Sample:
    """What the index would say of this sample, its image's bytes, and what a takedown may know it by. Raises Unusable."""
    file, group = io.BytesIO(), Group(sample["__key__"], broken=sample.get("__broken__", ""))
    for suffix, data in sample.items():
        if not suffix.startswith("__"):
            group.members[suffix] = (file.tell(), len(data))
            file.write(data)
    image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), b"")
    return {**row_of(file, group), "image": image, "known": known_by(file, group)}
