"""What `check` says: a line for each thing it looked at, whether that is good, and the cure where it is not."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table

from pipeline.console import OK, WORK_FAILED, InputError, WorkFailed, out, say, track

Level = Literal["ok", "warn", "bad"]
COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


@dataclass(frozen=True)
class Verdict:
    """One line."""

    what: str
    found: str
    level: Level = "ok"
    cure: str = ""


def judged(what: str, found: str, *cases: tuple[bool, Level, str]) -> Verdict:
    """The first case that holds gives level and cure."""
    for holds, level, cure in cases:
        if holds:
            return Verdict(what, found, level, cure)
    return Verdict(what, found)


def tried(what: str, verdicts: Callable[[], Iterable[Verdict]]) -> Iterator[Verdict]:
    """The verdicts; what they raise is one more."""
    try:
        yield from verdicts()
    except (InputError, WorkFailed) as error:
        yield Verdict(what, str(error), "bad")
    except Exception as error:  # a library's: it must not take the other verdicts away
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield Verdict(what, told, "bad", f"check what the configuration says of the {what}")


def show(verdicts: Iterable[Verdict]) -> int:
    """A table on a terminal, a line for each as it comes elsewhere → the exit code."""
    table, code = Table("", "found", "cure"), OK
    for verdict in track(verdicts, "checking"):
        code = WORK_FAILED if verdict.level == "bad" else code
        if out.is_terminal:
            table.add_row(f"[{COLOURS[verdict.level]}]{verdict.level}[/] {verdict.what}", escape(verdict.found),
                          escape(verdict.cure))
        else:
            say(f"{verdict.level:4} {verdict.what}: {verdict.found}" + (f" → {verdict.cure}" if verdict.cure else ""))
    if out.is_terminal:
        out.print(table)
    return code
