"""One run at a time in a folder: a lock that a requeued job takes over from a dead process and never from a live one.

The system's lock ends with its process, however that died. On most shared disks it holds on other machines too, on some it
does not reach them, nor another container's mount on the same machine; and a disk's server may keep it for a machine that
died. So the holder also counts in the file while it lives, and who finds another's name in it first looks on whether that
still counts, except where the system knows: a lock held on this machine is a live process's, and a process may be gone.
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
_LENGTH = 256  # bytes: a count that grows must not need room on a full disk


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
    (handle, made), over = _taken(run), threading.Event()
    me = {"process": os.getpid(), "host": socket.gethostname()[:64], "machine": _machine(), "processes": _processes(),
          "since": time.time_ns()}
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
        if made:
            with suppress(OSError):  # a run that did not begin leaves nothing
                run.rmdir()


def _taken(run: Path) -> tuple[int, bool]:
    """The lock's file, locked, and whether the folder is new. Raises InputError while a live process has it."""
    made = False
    while True:
        made = made or not run.is_dir()
        run.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder went with a run that did not begin
            continue
        try:
            if _free(run, handle):
                return handle, made
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _free(run: Path, handle: int) -> bool:
    """Whether the lock is ours now; not so when the file went with its holder meanwhile. Raises InputError for a live one."""
    held, reaches = False, True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held = True
    except OSError:  # a file system without locks: the count alone tells
        reaches = False
    found = _read(run)
    here = found.get("machine") == _machine()
    if held and here:
        raise _in_use(run, found)
    if held or (found and not (here and _gone(found))):
        _watch(run, handle, found, 3 * EVERY if here and reaches else SILENT)
    if held and _is_at(run, handle) and _read(run) == found:  # a disk's server keeps the lock of a machine that died
        (run / LOCK).unlink(missing_ok=True)
    return not held and _is_at(run, handle)


def _watch(run: Path, handle: int, found: dict[str, Any], seconds: float) -> None:
    """Raises InputError when the holder counts on within these seconds."""
    if found:
        say(f"waiting {seconds:.0f} s: does {_who(found)}, which worked in {run}, still live?")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and _is_at(run, handle):
        if (now := _read(run)) and now != found:
            raise _in_use(run, now)
        time.sleep(EVERY / 4)


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
        with suppress(OSError):  # what a disk cannot do now it may do the next time
            found = _read(run)
            if found.get("since", me["since"]) != me["since"]:
                _give_way(run, found)
            count += 1
            _write(handle, me, count)


def _give_way(run: Path, found: dict[str, Any]) -> None:
    try:
        print(f"error: {_who(found)} has taken over {run}: this process was silent for too long, and ends",
              file=sys.stderr, flush=True)
    finally:
        os._exit(1)


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
        found = json.loads(text or b"{}")
    except ValueError:  # being written this moment, or torn by a power cut
        found = None
    return found if isinstance(found, dict) else {"torn": text}


def _machine() -> str:
    """Differs between machines, and on one between its starts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _processes() -> str:
    """Within which numbers of processes are unique: containers on one machine have their own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        return ""


def _gone(found: dict[str, Any]) -> bool:
    """Whether the process that wrote this on our machine is surely no more; of another container we cannot tell."""
    if found.get("processes") != _processes() or not isinstance(found.get("process"), int):
        return False
    try:
        os.kill(found["process"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's; no number of a process
        pass
    return False


def _who(found: dict[str, Any]) -> str:
    return f"process {found.get('process', '?')} on {found.get('host', '?')}"


def _in_use(run: Path, found: dict[str, Any]) -> InputError:
    return InputError(f"{run} is in use by a run, {_who(found)}: wait for it or stop it, or choose another folder with "
                      "--set run.folder=…")
