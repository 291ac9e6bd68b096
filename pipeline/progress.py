"""How far a long job is: a rich bar on a terminal, otherwise a plain line every few seconds."""

import time
from contextlib import ExitStack

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.console import err

_SECONDS_BETWEEN_LINES = 5.0


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class Meter:
    """Counts up to `total`, 0 when nobody knows; `note` is what else the line should say. Use as a context manager.

    `start` is what an earlier run had done already: it counts as done but not towards the rate.
    """

    def __init__(self, what: str, total: int, start: int = 0):
        self.what, self.total, self.start, self.done = what, total, start, start
        self._began = self._last_line = time.monotonic()
        self._stack = ExitStack()
        self._bar: Progress | None = None

    def __enter__(self) -> "Meter":
        if err.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                       TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self._bar = self._stack.enter_context(Progress(*columns, console=err, transient=True))
            self._task = self._bar.add_task(self.what, total=self.total or None, completed=self.start, note="")
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def rate(self) -> float:
        """Items per second of this run."""
        return (self.done - self.start) / max(time.monotonic() - self._began, 1e-9)

    def at(self, done: int, note: str = "") -> None:
        """Show that `done` of the total are finished."""
        self.done = done
        note = f"{note} {self.rate:,.{0 if self.rate >= 10 else 1}f}/s".strip()
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            of_all = f"/{self.total:,}" if self.total else ""
            left = f" {clock((self.total - done) / self.rate)} left" if self.total and self.rate else ""
            err.print(f"{self.what} {done:,}{of_all} {note}{left}", markup=False)
