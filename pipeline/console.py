"""What every command shares: errors with an exit code, progress for people and for log files."""

import errno
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from pipeline.markup import visible

T = TypeVar("T")
OK, WORK_FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
_WIDE = 10_000  # columns: wider than any table
_UsageError: Any = typer.BadParameter.__base__  # Typer exports none that every release has


class Screen(Console):
    """A console on which no text of a stranger moves the cursor or changes what stands there already."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(visible(text), **how)

    def on_broken_pipe(self) -> None:
        """Who read our lines has left, as `head` does: the work goes on unheard. Rich would end the program here."""
        self.quiet = True
        with open(os.devnull, "w") as void:  # noqa: PTH123
            os.dup2(void.fileno(), self.file.fileno())  # else what is still buffered fails once more as Python ends


out = Screen(highlight=False, soft_wrap=True)
err = Screen(stderr=True, highlight=False, soft_wrap=True)


class InputError(ValueError):
    """Wrong input: names the thing, the place and the cure. The command exits 2."""


class WorkFailed(RuntimeError):
    """The input was right but the work could not be finished. The command exits 1."""


_FULL = "the disk is full: free some space there (`df -h` shows it)"
_FILES = "too many open files: allow more (`ulimit -n 4096`), or use fewer --threads"
_MEMORY = "out of memory: use fewer --processes or --threads"
_CURES = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL.replace("disk", "quota"), errno.EMFILE: _FILES, errno.ENFILE: _FILES,
          errno.ENOMEM: _MEMORY, errno.ENOBUFS: _MEMORY}


def what_failed(error: Exception, place: str = "", cure: str = "") -> str:
    """One line on trouble of this machine: the place, what happened, the cure. place, cure: where the error has none itself."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    where = getattr(error, "filename", None) or place
    if number in _CURES:
        told = f"{_CURES[number]}, then run the same command again"
    else:
        told = ": ".join(filter(None, [str(error) or type(error).__name__, cure]))
    return f"{where}: {told}" if where and (number in _CURES or where not in told) else told


def run(app: typer.Typer) -> None:
    """Run a Typer app; our two errors and wrong usage become one clear line and an exit code, not a traceback or a box."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that an old locale has not is spelt out: → is \u2192
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background of a shell it is ignored
        signal.signal(signal.SIGINT, _first_interrupt)
    try:
        code = app(standalone_mode=False)
    except (InputError, WorkFailed) as error:
        _fail(str(error), WRONG_INPUT if isinstance(error, InputError) else WORK_FAILED)
    except _UsageError as error:
        told = " ".join(error.format_message().split()).rstrip(".")
        if not told:  # a command without arguments: its help is on the screen
            sys.exit(WRONG_INPUT)
        _fail(f"{told[0].lower()}{told[1:]}: see {error.ctx.command_path} --help", WRONG_INPUT)
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _fail(f"{f'{error.filename}: {error.strerror}' if error.filename else error}: give another path", WRONG_INPUT)
    except OSError as error:
        _fail(what_failed(error), WORK_FAILED)
    if code == INTERRUPTED:  # Typer turns Ctrl-C into it without a word
        err.print("stopped by Ctrl-C; what is finished is kept (see --help on how to go on)", style="red")
    sys.exit(code)


def _first_interrupt(*_: object) -> NoReturn:
    """End in order; who presses Ctrl-C again does not want to wait for that, nor to see where it was."""
    signal.signal(signal.SIGINT, _second_interrupt)
    raise KeyboardInterrupt


def _second_interrupt(*_: object) -> NoReturn:
    os.write(2, b"\x1b[?25h\nstopped at once\n" if err.is_terminal else b"stopped at once\n")  # a bar hides the cursor
    os._exit(INTERRUPTED)


def _fail(told: str, code: int) -> NoReturn:
    err.print(f"error: {told}", style="red", markup=False)
    sys.exit(code)


def _tell_version(wanted: bool) -> None:
    if wanted:
        say(f"uniclip {version('uniclip')}")
        raise typer.Exit


def app(help: str, example: str) -> typer.Typer:
    """A Typer app with the settings all our commands share; its help ends with the example."""
    made = typer.Typer(help=help, epilog=f"Example: `{example}`", no_args_is_help=True, add_completion=False,
                       pretty_exceptions_enable=False, rich_markup_mode="markdown",
                       context_settings={"help_option_names": ["--help", "-h"]})

    @made.callback()
    def shared(version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True,
                                                     help="Show the version and exit.")] = False) -> None:
        pass

    return made


def command_line() -> str:
    """What was typed, with the program's name but not its folder, for the records."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def existing(path: Path, what: str, cure: str = "") -> Path:
    """`path` itself when it is there, an InputError that names it otherwise."""
    if not path.exists():
        raise InputError(f"{what} {path} does not exist: " + (cure or f"give its path, seen from {Path.cwd()}"))
    return path


def on_this_machine(path: Path) -> Path:
    """For arguments that must be paths here. Raises InputError for a URL."""
    if found := re.match(r"([a-z][a-z0-9+.-]+):/(?=[^/])", str(path)):  # of :// a Path keeps one slash
        raise InputError(f"{found[1]}://{str(path)[found.end():]}: only `download` writes to a URL: give a path of this "
                         "machine (mount the bucket, or copy the shards here)")
    return path


def say(line: str) -> None:
    """One plain line on standard output."""
    out.print(line, markup=False)


def show_table(table: RenderableType) -> None:
    """A table as wide as it is: no name or number is cut. On a narrow screen its lines continue below."""
    width = out.measure(table, options=out.options.update(width=_WIDE)).maximum
    Screen(file=out.file, width=max(width, out.width), highlight=False, quiet=out.quiet).print(table)


def warn(line: str) -> None:
    """One plain line on standard error: what goes wrong while the work goes on."""
    err.print(line, style="yellow", markup=False)


@contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Within, nothing is said when `wanted`: of several processes that do the same, one speaks."""
    out.quiet = err.quiet = wanted
    try:
        yield
    finally:
        out.quiet = err.quiet = False


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` while showing how far it is: a bar on a terminal, otherwise a plain line every few seconds."""
    from pipeline.progress import Meter  # which shows on this module's `err`

    listed = items if isinstance(items, Sized) else None
    count = total if total is not None else len(listed) if listed is not None else 0
    with Meter(what, count) as meter:
        for done, item in enumerate(items, start=1):
            yield item
            meter.at(done)
