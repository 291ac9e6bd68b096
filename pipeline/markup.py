"""Text of strangers (names of sets, sources, classes, captions) where a program would take it for orders."""

import re

_MARKDOWN = re.compile(r"([\\`*{}\[\]<>#|~!&]|(?<!\w)_|_(?!\w))")  # an underscore inside a word is one
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_FORMULA = tuple("=+-@\t\r")


def visible(text: str) -> str:
    """For a terminal: control characters as \\x1b, line breaks and tabs as they are. They could hide or fake lines."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def markdown(text: object) -> str:
    """For Markdown, also in a table: one line that is shown as it is."""
    return _MARKDOWN.sub(r"\\\1", visible(" ".join(str(text).split())))


def spreadsheet(value: object) -> object:
    """For a cell of CSV: a text that a spreadsheet would compute gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
