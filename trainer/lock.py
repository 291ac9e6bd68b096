"""One run at a time in a folder: a lock that a requeued job takes over from a dead process and never from a live one.

The system's lock ends with its process, however that died. On most shared disks it holds on other machines too, on some it
does not. So the holder also counts in the file while it lives, and who finds the lock free but the name of another machine's
process in it first looks on whether that still counts.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.console import InputError, WorkFailed, say

if TYPE_CHECKING:
    from trainer.distributed import Ranks

LOCK = ".lock"
EVERY, SILENT = 2.0, 20.0  # seconds: a disk between machines may show what another one wrote some seconds later
_LENGTH = 200  # bytes: a count that grows must not need room on a full disk


@contextmanager
def alone_in(run: Path, ranks: "Ranks") -> Generator[None]:
    """Within, no other run works in this folder; rank 0 holds the lock. Raises InputError on all ranks while one does."""
    with ExitStack() as stack:
        with ranks.agreeing():
            if ranks.rank == 0:
                stack.enter_context(_held(run))
        yield


@contextmanager
def _held(run: Path) -> Generator[None]:
    handle, over = _taken(run), threading.Event()
    me = {"process": os.getpid(), "host": socket.gethostname()[:64], "machine": _machine(), "since": time.time_ns()}
    try:
        _write(handle, me, 0)
    except OSError as error:
        os.close(handle)
        raise WorkFailed(f"{run / LOCK} could not be written ({error.strerror}): make room there") from None
    counting = threading.Thread(target=_count, args=(run, handle, me, over), name="lock", daemon=True)
    counting.start()
    try:
        yield
    finally:
        over.set()
        counting.join()
        if _is_at(run, handle):
            (run / LOCK).unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):  # a run that did not begin leaves nothing
            run.rmdir()


def _taken(run: Path) -> int:
    """The lock's file, locked. Raises InputError while a live process has it."""
    while True:
        run.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder went with a run that did not begin
            continue
        try:
            if _free(run, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _free(run: Path, handle: int) -> bool:
    """Whether the lock is ours now; not so when the file went with its holder meanwhile. Raises InputError for a live one."""
    locked, found = True, _read(run)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(run, found) from None
    except OSError:  # a file system without locks: the count alone tells
        locked = False
    found = _read(run)
    if found and not (locked and found.get("machine") == _machine()):
        say(f"waiting {SILENT:.0f} s: does {_who(found)}, which worked in {run}, still live?")
        deadline = time.monotonic() + SILENT
        while time.monotonic() < deadline and (now := _read(run)):
            if now != found:
                raise _in_use(run, now)
            time.sleep(EVERY / 4)
    return _is_at(run, handle)


def _is_at(run: Path, handle: int) -> bool:
    """Whether the open file is still the folder's lock."""
    try:
        return os.path.samestat(os.fstat(handle), (run / LOCK).stat())
    except FileNotFoundError:
        return False


def _count(run: Path, handle: int, me: dict[str, Any], over: threading.Event) -> None:
    """Show that this process lives. Where another has taken over, as from one suspended for long, it ends."""
    count = 0
    while not over.wait(EVERY):
        found = _read(run)
        if found.get("since", me["since"]) != me["since"]:
            print(f"error: {_who(found)} has taken over {run}: this process was silent for too long, and ends",
                  file=sys.stderr, flush=True)
            os._exit(1)
        count += 1
        with suppress(OSError):
            _write(handle, me, count)


def _write(handle: int, me: dict[str, Any], count: int) -> None:
    os.pwrite(handle, json.dumps(me | {"count": count}).ljust(_LENGTH).encode(), 0)
    os.fsync(handle)


def _read(run: Path) -> dict[str, Any]:
    """What the holder wrote; empty where none did. Opened anew: then a shared disk looks at what other machines wrote."""
    try:
        text = (run / LOCK).read_bytes()
    except FileNotFoundError:
        return {}
    try:
        return json.loads(text or b"{}")
    except ValueError:  # being written this moment, or torn by a power cut
        return {"torn": text}


def _machine() -> str:
    """Differs between machines, and on one between its starts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _who(found: dict[str, Any]) -> str:
    return f"process {found.get('process', '?')} on {found.get('host', '?')}"


def _in_use(run: Path, found: dict[str, Any]) -> InputError:
    return InputError(f"{run} is in use by a run, {_who(found)}: wait for it or stop it, or choose another folder with "
                      "--set run.folder=…")
