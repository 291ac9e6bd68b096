"""Whole shards of a remote store, copied to a local folder of bounded size that several processes may share."""

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.console import InputError
from pipeline.faults import Recurring, driving
from pipeline.files import sha256_of

STALE_PART = 600.0  # seconds without a byte
TRIES = 3  # copies of a shard, before its reads are left to the URL
_COPY = re.compile(r"[0-9a-f]{64}\.(tar|part)")  # what may be removed from the folder


@dataclass(frozen=True)
class Copied:
    """A whole shard as its index knows it; its copy's name says its content, wherever it came from."""

    name: str
    size: int
    sha256: str

    @property
    def copy(self) -> str:
        """File name of the copy."""
        return f"{self.sha256}.tar"


@dataclass
class Cache:
    """Whole shards copied to a local folder by a thread; at most `limit` bytes of them. Processes may share the folder.

    A copy that fails, for want of space or for what it holds, is said and counted. Its reads go to the URL; it is tried TRIES
    times, and once where the store has another content than the index knows.
    """

    folder: Path
    limit: int
    fetch: Callable[[str, Path], None]
    shards: list[Copied]
    _wanted: list[int] = field(default_factory=list)
    _wake: threading.Event = field(default_factory=threading.Event)
    _closed: bool = False
    _tries: Counter[int] = field(default_factory=Counter)
    _broken: Exception | None = None

    def __post_init__(self):
        self.failed = Recurring("data.cache: a shard could not be copied and is read from its URL, which takes longer")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"data.cache = {self.folder} cannot be made: {error}") from None
        threading.Thread(target=self._work, name="shard cache", daemon=True).start()

    def path(self, shard: int) -> Path:
        """Where the copy is, when there is one."""
        return self.folder / self.shards[shard].copy

    def want(self, shards: list[int]) -> None:
        """Have these, the first ones first; the rest may leave. Raises what ended the thread that copies."""
        if self._broken:
            raise self._broken
        if shards != self._wanted:
            self._wanted = shards
            self._wake.set()

    def _work(self) -> None:
        try:
            while not self._closed:
                self._wake.wait()
                self._wake.clear()
                self._copy_all(self._wanted)
        except Exception as error:  # no file system's: handed to the consumer
            self._broken = error

    def _copy_all(self, wanted: list[int]) -> None:
        for shard in wanted:
            if self._closed or wanted is not self._wanted:
                break
            if self._tries[shard] >= TRIES:
                continue
            try:
                if not self._have(shard, wanted):
                    break
            except OSError as error:  # the next shard may be well
                self._tries[shard] += 1
                self.failed.happened(f"{self.shards[shard].name}: {error}")

    def _have(self, shard: int, wanted: list[int]) -> bool:
        """Copy a shard that is missing; False when there is no room left for it. Raises OSError."""
        told, target = self.shards[shard], self.path(shard)
        self.folder.mkdir(exist_ok=True)  # another process may have removed it
        if _size(target) == told.size:
            return True
        target.unlink(missing_ok=True)  # cut short by whoever: copy it again
        if not self._make_room(told.size, {self.shards[s].copy for s in wanted}):
            return False
        temporary = target.with_suffix(".part")
        if not _claim(temporary):
            return True  # another process is copying it
        try:
            with driving():
                self.fetch(told.name, temporary)
            if (size := _size(temporary)) is None:
                raise OSError("its copy went while it was made")
            if size != told.size or sha256_of(temporary) != told.sha256:
                self._tries[shard] = TRIES  # the store would give the same again
                raise OSError("its content is not what the index knows: copy the shard there again, or index it anew")
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return True

    def _make_room(self, size: int, keep: set[str]) -> bool:
        """Let the oldest copies go that nobody wants, as many as it takes; whether there is room for `size` bytes then."""
        held = [(path, found) for path in self.folder.iterdir() if _COPY.fullmatch(path.name) and (found := _stat(path))]
        room = self.limit - sum(found.st_size for _, found in held)
        for path, found in sorted(held, key=lambda one: one[1].st_mtime):
            if room < size and path.name not in keep and (path.suffix == ".tar" or _stale(found)):
                path.unlink(missing_ok=True)
                room += found.st_size
        return room >= size

    def close(self) -> None:
        """Stop copying; what is there stays for the next run."""
        self._closed = True
        self._wake.set()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # another process removed it
        return None


def _size(path: Path) -> int | None:
    found = _stat(path)
    return found.st_size if found else None


def _stale(part: os.stat_result) -> bool:
    return time.time() - part.st_mtime > STALE_PART


def _claim(part: Path) -> bool:
    """Begin a copy that no other process is making; one that has not grown for long has lost its maker."""
    if (found := _stat(part)) and _stale(found):
        part.unlink(missing_ok=True)
    try:
        part.open("xb").close()
    except FileExistsError:
        return False
    return True
