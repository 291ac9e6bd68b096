"""What the machine asks of a run: SIGTERM – save and stop; SIGUSR1 – save and go on. Noted here, obeyed between steps."""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

_ANNOUNCED = {signal.SIGTERM: "SIGTERM: saving a checkpoint, then stopping",
              signal.SIGUSR1: "SIGUSR1: saving a checkpoint after this step"}


class Stopped(Exception):
    """SIGTERM while waiting."""


class Orders:
    """Context that listens for them; only a process's main thread can."""

    def __init__(self) -> None:
        self._asked = self._answered = 0
        self.stop = self._waiting = False
        self._before: dict[int, object] = {}

    def save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked = self._asked  # one read: a signal may come at any moment
        new, self._answered = asked != self._answered, asked
        return new

    @contextmanager
    def waiting(self, alone: bool) -> Generator[None]:
        """In here SIGTERM raises Stopped at once: a read may stall. Not where other ranks wait for this one's step."""
        self._waiting = alone
        try:
            if self.stop and alone:
                raise Stopped
            yield
        finally:
            self._waiting = False

    def __enter__(self) -> "Orders":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _ANNOUNCED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: object) -> None:
        self._asked, self.stop = self._asked + 1, self.stop or number == signal.SIGTERM
        with suppress(OSError):  # nobody listens
            os.write(2, f"{_ANNOUNCED[signal.Signals(number)]}\n".encode())  # a handler may not use buffered files
        if self.stop and self._waiting:
            raise Stopped
