"""Bytes of tar members by offset: local tars or any fsspec URL with a bounded cache, read ahead, given up when stalled."""

import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from aiohttp import ClientTimeout
from fsspec.core import url_to_fs

from pipeline.cache import Cache, Copied
from pipeline.console import InputError
from pipeline.faults import driving

OPEN_SHARDS = 128
T = TypeVar("T")
READERS = 16  # reads at a time; a remote store answers many at once
HTTP = ("http://", "https://")
HTTP_TIMEOUT = ClientTimeout(total=None, sock_read=300)  # a tar may take longer than the five minutes that are aiohttp's
WAKE = 0.1  # seconds after which a waiting consumer sees that its reads were closed


class Shards(Protocol):
    """Where the tars of an index are."""

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Raises OSError when the shard is gone or shorter than the index says."""
        ...

    def expect(self, shards: Iterable[int]) -> None:
        """These shards will be read from soon, in this order; others may be forgotten."""
        ...

    def close(self) -> None: ...


class _Descriptor:
    """An open file that closes with its last user, who may be reading while others forget it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise OSError(f"{len(data)} bytes where the index says {size}")
    return data


class ShardReader:
    """Tars in a local folder; keeps the last OPEN_SHARDS open. Safe to call from many threads."""

    def __init__(self, folder: Path, shards: list[str]):
        self._folder, self._shards = folder, shards
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def _file(self, shard: int) -> _Descriptor:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        file = _Descriptor(self._folder / self._shards[shard])  # outside the lock: opening may stall
        with self._lock:
            file = self._open.setdefault(shard, file)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return file

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Raises OSError when the shard is gone or shorter than the index says."""
        file = self._file(shard)  # held while reading: another thread may forget it meanwhile
        return _whole(os.pread(file.number, size, offset), size)

    def expect(self, shards: Iterable[int]) -> None:
        """The kernel reads ahead by itself."""

    def keep(self, shards: set[int]) -> None:
        """Close all others: a file that was removed takes its space as long as it is open."""
        with self._lock:
            for shard in self._open.keys() - shards:
                del self._open[shard]

    def close(self) -> None:
        """Close every file that nobody is reading."""
        with self._lock:
            self._open.clear()


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there. Raises ValueError, ImportError."""
    if not url.startswith(HTTP):
        return url_to_fs(url)
    return url_to_fs(url, client_kwargs={"timeout": HTTP_TIMEOUT})


def _opened(url: str) -> tuple[Any, str]:
    try:
        return file_system(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"data.shards = {url!r}: {error}") from None


class RemoteShards:
    """Tars under an fsspec URL: members by range, and from whole copies where a cache has them."""

    def __init__(self, url: str, shards: list[Copied], cache: Path | None, cache_bytes: int):
        self._fs, self._root = _opened(url)
        self._shards = shards
        self._cache = Cache(cache, cache_bytes, self._fetch, shards) if cache else None
        self._copies = ShardReader(cache, [shard.copy for shard in shards]) if cache else None

    def _fetch(self, name: str, target: Path) -> None:
        self._fs.get_file(f"{self._root}/{name}", str(target))

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """From the cache, else by range. Raises OSError."""
        if self._cache and self._copies and self._cache.path(shard).exists():
            try:
                return self._copies.read(shard, offset, size)
            except FileNotFoundError:
                pass  # it left the cache just now
            except OSError as error:
                self._cache.failed.happened(f"the copy of {self._shards[shard].name}: {error}")
        with driving():
            data = self._fs.cat_file(f"{self._root}/{self._shards[shard].name}", start=offset, end=offset + size)
        return _whole(bytes(data), size)

    def expect(self, shards: Iterable[int]) -> None:
        """Copy these shards into the cache, as far as it has room."""
        if self._cache and self._copies:
            wanted = list(shards)
            self._cache.want(wanted)
            self._copies.keep(set(wanted))

    def close(self) -> None:
        """Close the copies."""
        if self._cache and self._copies:
            self._cache.close()
            self._copies.close()


@dataclass(frozen=True)
class Place:
    """Where shards are and how long a read may take.

    url: a folder or fsspec URL when the tars are not beside their index; cache: folder for copies of remote shards, at
    most cache_bytes of them; timeout in seconds.
    """

    url: str = ""
    cache: Path | None = None
    cache_bytes: int = 20 * 2**30
    timeout: float = 60.0

    def check(self, folder: Path, shards: list[dict]) -> None:
        """Raise InputError when a shard is missing or has another size than its index says, or a store does not answer."""
        if "://" in self.url:
            self._check_remote(shards)
            return
        root = Path(self.url) if self.url else folder
        for shard in shards:
            path = root / shard["name"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["size"]:
                raise InputError(f"{path} is {_found(size, shard)}: put it back, or run `uniclip-data index {folder}` again")

    def _check_remote(self, shards: list[dict]) -> None:
        fs, root = _opened(self.url)
        reads, asked = ReadAhead(), 4 * READERS
        try:
            for part in (shards[start:start + asked] for start in range(0, len(shards), asked)):
                infos = reads.answers(reads.ask([partial(fs.info, f"{root}/{shard['name']}") for shard in part]), self.timeout)
                for shard, info in zip(part, infos, strict=True):
                    name = f"{self.url}/{shard['name']}"
                    if isinstance(info, Exception):
                        raise InputError(f"{name} is missing or does not answer ({info.__cause__ or info!r}): copy it there, "
                                         "check data.shards, or wait longer with data.read_timeout")
                    if (size := info.get("size")) not in {None, shard["size"]}:  # a web server may not tell it
                        raise InputError(f"{name} is {_found(size, shard)}: copy it there again, or give the index of these "
                                         "shards")
        finally:
            reads.close()

    def shards(self, folder: Path, shards: list[dict]) -> Shards:
        """A reader of a manifest's shards. Raises InputError for a URL that fsspec cannot open."""
        if "://" in self.url:
            told = [Copied(shard["name"], shard["size"], shard["sha256"]) for shard in shards]
            return RemoteShards(self.url, told, self.cache, self.cache_bytes)
        return ShardReader(Path(self.url) if self.url else folder, [shard["name"] for shard in shards])


def _found(size: int | None, shard: dict) -> str:
    return "missing" if size is None else f"{size:,} bytes and was {shard['size']:,}"


def _outcome(future: "Future[T]") -> T | Exception:
    try:
        return future.result()
    except Exception as error:  # the caller's to judge; with its traceback it would keep the caller's frame alive
        error.__context__ = None
        return error.with_traceback(None)


class Closed(Exception):
    """Nobody waits for this read any more: its loader was closed."""


class ReadAhead:
    """Runs reads on threads before their results are needed; the threads never keep a process from ending.

    A read that does not answer keeps its thread; another thread takes that one's place.
    """

    def __init__(self, threads: int = READERS):
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._threads, self._closed = 0, False
        self._more(threads)

    def _more(self, threads: int) -> None:
        self._threads += threads
        for _ in range(threads):
            threading.Thread(target=self._work, name="reader", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, read = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(read())
                except Exception as error:  # handed to whoever collects
                    future.set_exception(error)

    def ask(self, reads: Sequence[Callable[[], T]]) -> "list[Future[T]]":
        """Queue reads; collect them with `answers`."""
        futures = [Future() for _ in reads]
        for job in zip(futures, reads, strict=True):
            self._jobs.put(job)
        return futures

    def answers(self, futures: "list[Future[T]]", timeout: float) -> list[T | Exception]:
        """Results in order; an exception where there is none, TimeoutError where none came in `timeout` seconds.

        Raises Closed, when `close` comes first.
        """
        late, end = set(futures), time.monotonic() + timeout
        while late and (left := end - time.monotonic()) > 0:
            late = wait(late, min(left, WAKE)).not_done
            if late and self._closed:
                raise Closed("the loader was closed: make another to go on")
        if stuck := [future for future in late if not future.cancel()]:
            self._more(len(stuck))
        gone = TimeoutError(f"no answer in {timeout:g} s")
        return [gone if future in late else _outcome(future) for future in futures]

    def close(self) -> None:
        """Let the threads end, and whoever waits for an answer."""
        self._closed = True
        for _ in range(self._threads):
            self._jobs.put(None)
