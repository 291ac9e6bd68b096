"""A run's checkpoints as it writes them: on threads of their own, while it goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipeline.console import WorkFailed, say
from trainer.checkpoint import Snapshot, retain, save
from trainer.config import RunConfig
from trainer.mirror import Mirror


class Saver:
    """Writes checkpoints from a thread, one at a time, while the run goes on; another thread copies them to the mirror.

    While a copy takes long the run writes further ones, of which the newest is copied next. A mirror that fails gets the
    next one: only at the ends of a run must it have taken the last. newest: samples seen at it.
    """

    newest: int | None = None

    def __init__(self, run: RunConfig):
        self._run, self._keep, self._mirror = run.folder, run.keep, Mirror(run.mirror) if run.mirror else None
        self._writer, self._copier = ThreadPoolExecutor(1, "checkpoint"), ThreadPoolExecutor(1, "mirror")
        self._writing: Future | None = None
        self._copies: dict[Path, Future] = {}
        self._not_copied: WorkFailed | None = None

    def save(self, taken: Snapshot) -> None:
        """Begin to write, once the one before is written. Raises WorkFailed when that failed."""
        self.wait()
        self._writing = self._writer.submit(self._save, taken)

    def wait(self) -> None:
        """Until all is written. Raises WorkFailed (disk full, read-only)."""
        if self._writing:
            self._writing.result()

    @property
    def written(self) -> bool:
        """Whether nothing is being written."""
        return self._writing is None or self._writing.done()

    @property
    def copied(self) -> bool:
        """Whether nothing is being written or copied."""
        return self.written and not self._uncopied()

    def finish(self) -> None:
        """Until all is written and copied. Raises WorkFailed, also when the mirror did not take the last checkpoint."""
        self.wait()
        if self._copies:
            [*self._copies.values()][-1].result()
            retain(self._run / "checkpoints", self._keep)
        if self._not_copied:
            raise self._not_copied

    def check(self) -> None:
        """Raises the WorkFailed of a checkpoint that could not be written."""
        if self.written:
            self.wait()

    def close(self) -> None:
        """Give the threads back; what they are writing is written when this returns, what they are copying will be."""
        self._writer.shutdown()
        self._copier.shutdown(wait=False)  # after an error the other ranks must hear of it before a slow mirror has all

    def _uncopied(self) -> list[Path]:
        return [folder for folder, copy in self._copies.items() if not copy.done()]

    def _save(self, taken: Snapshot) -> None:
        for copy in self._copies.values():
            copy.cancel()  # this one will be copied instead
        copying = self._uncopied()
        folder = save(self._run, taken, self._keep, copying)
        if self._mirror:
            self._copies = {one: self._copies[one] for one in copying} | {folder: self._copier.submit(self._copy, folder)}

    def _copy(self, folder: Path) -> None:
        try:
            self._mirror.copy(folder, self._keep)  # type: ignore[union-attr]
            self._not_copied = None
        except WorkFailed as error:
            say(f"warning: {error}; the next checkpoint will try again")
            self._not_copied = error
