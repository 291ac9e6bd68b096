"""A generator that works on a thread, a few items ahead of its consumer."""

import atexit
import ctypes
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from pipeline.ledger import Ledger
from pipeline.recipe import Cursor
from pipeline.schema import Batch

T = TypeVar("T")
PREFETCHED_BATCHES = 2
ENDING = 10.0  # seconds that the thread has to finish what it executes
TRIM_EVERY = 32  # batches
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it


def delivered(batches: Iterator[tuple[Batch, Cursor, list[dict]]], ledger: Ledger, wake: Callable[[], None],
              close: Callable[[], None]) -> Generator[tuple[Batch, Cursor], None, None]:
    """(Batch, Cursor) made ahead on a thread; the bad samples of each are counted as it leaves. Raises WorkFailed.

    Images come in all sizes, and glibc keeps hundreds of megabytes of the gaps they leave: those are given back at times.
    """
    stream = prefetched(batches, PREFETCHED_BATCHES, wake, close)
    try:
        for number, (batch, cursor, bad) in enumerate(stream, 1):
            ledger.count(len(batch.valid), bad)
            if _trim and number % TRIM_EVERY == 0:
                _trim(0)
            yield batch, cursor
    finally:
        stream.close()


def prefetched(items: Iterator[T], depth: int, wake: Callable[[], None], close: Callable[[], None]
               ) -> Generator[T, None, None]:
    """Yield endless `items` made by a thread, at most `depth` of them waiting.

    When the consumer stops, `wake` ends what the thread waits for, and `close` runs after the thread. An exception of the
    thread is raised to the consumer. At the end of the process the thread is stopped too: DALI aborts when the interpreter
    goes away under a running pipeline. One that does not stop in ENDING seconds is left behind, unclosed.
    """
    ahead: queue.Queue = queue.Queue(depth)
    stop = threading.Event()
    worker = threading.Thread(target=_work, args=(items, ahead, stop), name="loader", daemon=True)
    worker.start()

    def end() -> None:
        stop.set()
        wake()
        deadline = time.monotonic() + ENDING
        while worker.is_alive():  # the worker may be waiting for room
            if time.monotonic() > deadline:
                return
            try:
                ahead.get(timeout=0.05)
            except queue.Empty:
                continue
        close()

    atexit.register(end)
    try:
        while True:
            item = ahead.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        atexit.unregister(end)
        end()


def _work(items: Iterator, ahead: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in items:
            ahead.put(item)
            if stop.is_set():
                break
    except BaseException as error:  # handed to the consumer, who raises it
        ahead.put(error)
