"""A generator that works on a thread, a few items ahead of its consumer."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterator[T], depth: int, close: Callable[[], None]) -> Generator[T, None, None]:
    """Yield `items` made by a thread, at most `depth` of them waiting; `close` runs when the consumer stops.

    An exception of the thread is raised to the consumer.
    """
    ahead: queue.Queue = queue.Queue(depth)
    stop = threading.Event()
    worker = threading.Thread(target=_work, args=(items, ahead, stop), name="loader", daemon=True)
    worker.start()
    try:
        while True:
            item = ahead.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        while worker.is_alive():  # the worker may be waiting for room
            try:
                ahead.get(timeout=0.05)
            except queue.Empty:
                continue
        close()


def _work(items: Iterator, ahead: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in items:
            ahead.put(item)
            if stop.is_set():
                break
    except BaseException as error:  # handed to the consumer, who raises it
        ahead.put(error)
