"""Which columns and rows of a table are taken: a row as read → its URL and captions, or the reason why it has none."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.console import InputError
from pipeline.schema import resource
from pipeline.tables import Table
from pipeline.text import CAPTION_CHARACTERS, says_nothing

_PATH_SAFE = "/~!$&'()*+,;=:@"  # legal in a URL's path, so left as they are by --url-prefix
_ANOTHER = re.compile(r"(?i)[\s|]https?://")  # none of these characters may stand inside a URL


@dataclass(frozen=True)
class Choice:
    """Which columns to take, from which rows. `where`: (column, value) pairs that all must hold."""

    url: str
    captions: tuple[str, ...]
    url_prefix: str = ""
    where: tuple[tuple[str, str], ...] = ()
    source: str = ""
    expect: tuple[int, ...] = ()  # numbers of rows, one of which the table must have; none: any number


def condition(text: str) -> tuple[str, str]:
    """`COLUMN=VALUE` as --where takes it."""
    column, equals, value = text.partition("=")
    if not (column and equals):
        raise InputError(f"--where {text!r} must read COLUMN=VALUE, as in --where split=train")
    return column, value


def _column(names: list[str], wanted: str, path: Path) -> int:
    if names.count(wanted) > 1:
        raise InputError(f"{path} has {names.count(wanted)} columns {wanted!r}: rename all but one")
    if wanted in names:
        return names.index(wanted)
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"{path} has no column {wanted!r}: {hint}it has {', '.join(names)}")


class _Refused(Exception):
    """A row that gives no sample; the message is the reason."""


def _texts(value: Any, what: str) -> list[str]:
    """The different texts of one cell, which in JSON and Parquet may be a list. Raises _Refused for anything but text."""
    if isinstance(value, str):
        return [text] if (text := value.strip()) else []
    values = [one for one in (value if isinstance(value, list) else [value]) if one is not None and one == one]  # NaN is not
    if any(isinstance(one, bool) or not isinstance(one, str | bytes | int | float) for one in values):
        raise _Refused(f"{what} is no text")
    return list(dict.fromkeys(text for one in values if (text := _as_text(one).strip())))


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


class Selector:
    """Row as read → (url, captions), the reason it is refused, or None when it is not asked for."""

    def __init__(self, table: Table, choice: Choice, path: Path):
        self.path, self.prefix = path, choice.url_prefix
        self.url = _column(table.names, choice.url, path)
        self.captions = [_column(table.names, name, path) for name in choice.captions]
        self.where = [(_column(table.names, name, path), value) for name, value in choice.where]
        self.seen: dict[str, None] = {}  # some values of the --where columns, for the message when none fits

    def __call__(self, cells: list[Any]) -> tuple[str, list[str]] | str | None:
        for column, value in self.where:
            if (found := _as_text(cells[column])) != value:
                if len(self.seen) < 10:
                    self.seen[found] = None
                return None
        try:
            return self._url(_texts(cells[self.url], "url")), self._captions(cells)
        except _Refused as refused:
            return str(refused)
        except UnicodeEncodeError:
            return "not UTF-8"

    def _url(self, found: list[str]) -> str:
        """Raises _Refused, or UnicodeEncodeError for bytes that are no UTF-8."""
        if len(found) > 1 or found and not self.prefix and _ANOTHER.search(found[0]):
            raise _Refused("several URLs")
        "".join(found).encode()
        path = quote(found[0], safe=_PATH_SAFE) if found and self.prefix else "".join(found)
        if not resource(path):
            raise _Refused("empty url")
        return resource(self.prefix + path)

    def _captions(self, cells: list[Any]) -> list[str]:
        """As `_url`."""
        captions = list(dict.fromkeys(text for column in self.captions for text in _texts(cells[column], "caption")))
        if sum(map(len, captions)) > CAPTION_CHARACTERS:
            raise _Refused(f"captions of more than {CAPTION_CHARACTERS:,} characters")
        "".join(captions).encode()
        if not (captions := [text for text in captions if not says_nothing(text)]):
            raise _Refused("empty caption")
        return captions
