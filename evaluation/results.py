"""Result rows: one JSON line a number, with its interval and everything needed to get it again."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.console import InputError
from pipeline.seals import is_sealed, read_lines, sealed_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One number over n queries or images: value, 95 % interval and chance level in 0…1."""

    metric: str
    n: int
    value: float
    interval: tuple[float, float]
    chance: float
    main_metric: bool


@dataclass(frozen=True)
class Provenance:
    """What a number was computed from. Two rows of equal provenance and metric are the same measurement.

    protocol: the variant of the task that was run, such as which templates.
    """

    dataset: str
    split: str
    task: str
    weights_sha256: str
    data_sha256: str
    prompts_sha256: str | None
    transform: str
    protocol: str

    def fits(self, row: Row) -> bool:
        """Whether `row` was measured on the same weights, data, prompts and transform, by the same protocol."""
        return all(row.get(name) == value for name, value in asdict(self).items())


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file, none when it is absent; a last line torn by a kill is left out.

    Raises InputError naming a line that is no row.
    """
    rows = []
    for number, row in enumerate(read_lines(path, "remove the line, and measure it again"), 1):
        try:
            rows.append(row | {"value": float(row["value"]), "metric": str(row["metric"])})
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number} is no result row: repair or remove the line") from None
    return rows


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows in one write, so that evaluations running side by side can share a file.

    A torn last line goes; one that lacks only its end of line is a row for `read_lines`, and stays one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        file.seek(0)
        written = file.read()
        tail = written[written.rfind(b"\n") + 1:]
        if tail and not is_sealed(tail):
            file.truncate(len(written) - len(tail))
        file.write(b"\n" * is_sealed(tail) + b"".join(sealed_json(row, ensure_ascii=False) + b"\n" for row in rows))
