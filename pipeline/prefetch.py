"""A generator that works on a thread, a few items ahead of its consumer."""

import atexit
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterator[T], depth: int, close: Callable[[], None]) -> Generator[T, None, None]:
    """Yield endless `items` made by a thread, at most `depth` of them waiting; `close` runs when the consumer stops.

    An exception of the thread is raised to the consumer. At the end of the process the thread is stopped too: DALI aborts
    when the interpreter goes away under a running pipeline.
    """
    ahead: queue.Queue = queue.Queue(depth)
    stop = threading.Event()
    worker = threading.Thread(target=_work, args=(items, ahead, stop), name="loader", daemon=True)
    worker.start()

    def end() -> None:
        stop.set()
        while worker.is_alive():  # the worker may be waiting for room
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
