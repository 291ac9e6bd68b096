"""Whose fault an error is: the machine's ends the work, a sample's is counted; and what comes again is said once."""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.console import warn

_USED_UP = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT}


def of_machine(error: BaseException) -> bool:
    """Memory, open files or the disk are used up: the next sample would fare no better."""
    return isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno in _USED_UP


def reason(error: Exception, *kinds: type[Exception]) -> str:
    """Why a sample is not there, in the error's words. Raises what is none of `kinds`, or the machine's fault."""
    if of_machine(error) or not isinstance(error, kinds):
        raise error
    return str(error) or type(error).__name__


@contextmanager
def driving() -> Generator[None]:
    """Drivers of file systems raise what they like, some of it not even picklable: all of it becomes OSError.

    A MemoryError stays one. Only the driver's own call belongs in here, lest our errors be taken for its.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


@dataclass
class Recurring:
    """What may go wrong again and again without ending the work: said the first time and at each power of ten, counted."""

    what: str
    count: int = 0

    def happened(self, told: str) -> None:
        """Count it, and say it when it is due."""
        self.count += 1
        if self.count == 1:
            warn(f"{self.what}: {told}")
        elif self.count == 10 ** (len(str(self.count)) - 1):
            warn(f"{self.what}: {self.count:,} times so far, the last: {told}")
