"""A function over many tasks in spawned processes, a few tasks ahead, without orphans and without hanging."""

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import TypeVar

from pipeline.console import InputError, WorkFailed

Task = TypeVar("Task")
Result = TypeVar("Result")
_FILES_OF_A_PROCESS = 24  # that a worker has open; each of its threads opens one more


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allow_files(threads: int) -> None:
    """Let this process and its children open as many files as they need. Raises InputError where the system does not."""
    wanted = _FILES_OF_A_PROCESS + threads
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise InputError(f"{hard} open files are allowed here (`ulimit -Hn`), {threads} threads need {wanted}: allow more, "
                         "or use fewer --threads")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def in_processes(function: Callable[[Task], Result], tasks: Iterable[Task],
                 processes: int | None = None) -> Iterator[Result]:
    """Results in the order they are finished; at most two tasks a process are taken from `tasks` ahead.

    processes: by default one for each core.

    Not multiprocessing.Pool: that one waits for ever when a worker is killed. Raises what `function` raises, and
    WorkFailed for a killed worker.
    """
    ahead, processes = iter(tasks), processes or cores()
    # A killed worker cannot release its locks; Python's tracker does, but reports it between our lines.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    with ProcessPoolExecutor(processes, get_context("spawn"), _quiet_and_mortal) as pool:
        waiting = {pool.submit(function, task) for task in islice(ahead, 2 * processes)}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                waiting |= {pool.submit(function, task) for task in islice(ahead, len(done))}
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise WorkFailed("a worker process was killed, perhaps for want of memory: run the same command again, "
                             "with fewer processes") from None
        except BaseException:  # do not wait for what still runs; else do, or Python may write into a closed pipe as it ends
            for future in waiting:
                future.cancel()
            pool.shutdown(wait=False)
            raise


def _quiet_and_mortal() -> None:
    """Set a worker up: no chatter from libraries, and gone as soon as its parent is, however that died."""
    parent = parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    with Path(os.devnull).open("w", encoding="utf-8") as void:
        os.dup2(void.fileno(), 1)
        os.dup2(void.fileno(), 2)
