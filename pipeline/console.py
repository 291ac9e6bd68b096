"""What every command shares: errors with an exit code, progress for people and for log files."""

import sys
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console

T = TypeVar("T")
OK, WORK_FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class InputError(ValueError):
    """Wrong input: names the thing, the place and the cure. The command exits 2."""


class WorkFailed(RuntimeError):
    """The input was right but the work could not be finished. The command exits 1."""


def run(app: typer.Typer) -> None:
    """Run a Typer app; our two errors become one clear line and an exit code instead of a traceback."""
    try:
        app()
    except (InputError, WorkFailed) as error:
        err.print(f"error: {error}", style="red", markup=False)
        sys.exit(WRONG_INPUT if isinstance(error, InputError) else WORK_FAILED)
    except OSError as error:  # a folder that cannot be written, a full disk: the system's own words name the place
        err.print(f"error: {error}", style="red", markup=False)
        sys.exit(WORK_FAILED)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # Typer turns Ctrl-C into it without a word
            err.print("stopped by Ctrl-C; what is finished is kept (see --help on how to go on)", style="red")
        raise


def app(help: str) -> typer.Typer:
    """A Typer app with the settings all our commands share."""
    return typer.Typer(help=help, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                       rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]})


def existing(path: Path, what: str, cure: str = "") -> Path:
    """`path` itself when it is there, an InputError that names it otherwise."""
    if not path.exists():
        raise InputError(f"{what} {path} does not exist" + (f": {cure}" if cure else ""))
    return path


def say(line: str) -> None:
    """One plain line on standard output."""
    out.print(line, markup=False)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` while showing how far it is: a bar on a terminal, otherwise a plain line every few seconds."""
    from pipeline.progress import Meter  # which shows on this module's `err`

    listed = items if isinstance(items, Sized) else None
    count = total if total is not None else len(listed) if listed is not None else 0
    with Meter(what, count) as meter:
        for done, item in enumerate(items, start=1):
            yield item
            meter.at(done)
