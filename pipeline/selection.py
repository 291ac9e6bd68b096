"""`filter`: conditions on columns → a skip list of the samples that do not meet them all."""

import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.columns import COLUMNS, tables
from pipeline.console import InputError, WorkFailed
from pipeline.index import Index
from pipeline.progress import Meter
from pipeline.skips import present, write_skips

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "=": operator.eq, ">": operator.gt, "<": operator.lt}
_CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|!=|=|>|<)\s*(.*?)\s*")


@dataclass(frozen=True)
class Condition:
    """`column operator value`; a name is compared as text, everything else as a number."""

    text: str
    column: str
    operator: str
    value: str

    def met(self, values: np.ndarray) -> np.ndarray:
        if values.dtype == object:
            if self.operator not in {"=", "!="}:
                raise InputError(f"--keep {self.text!r}: {self.column} is a name, compare it with = or !=")
            return np.asarray(_OPERATORS[self.operator](values, self.value), bool)
        try:
            return _OPERATORS[self.operator](values, int(self.value) if self.value.isdigit() else float(self.value))
        except ValueError:
            raise InputError(f"--keep {self.text!r}: {self.value!r} is no number") from None


def condition(text: str) -> Condition:
    """As --keep takes it. Raises InputError."""
    found = _CONDITION.fullmatch(text)
    if not found or not found[3]:
        raise InputError(f"--keep {text!r} must read COLUMN OPERATOR VALUE, as in --keep 'side>=128'")
    if found[1] not in COLUMNS:
        raise InputError(f"--keep {text!r}: no column {found[1]!r}; there are {', '.join(COLUMNS)}")
    return Condition(text, found[1], found[2], found[3])


def select(index: Index, out: Path, conditions: list[Condition]) -> dict[str, int]:
    """Write the skip list; returns how many samples each condition is the first to refuse. Raises WorkFailed when all.

    What is taken down is neither counted nor listed.
    """
    here = np.zeros(len(index), bool)
    here[present(index)] = True
    reasons: dict[int, str] = {}
    with Meter("filtering", len(index)) as meter:
        for table in tables(index):
            left = here[meter.done:meter.done + table.num_rows].copy()
            ids = table["sample_id"].to_numpy()
            for one in conditions:
                kept = one.met(COLUMNS[one.column][1](table))
                reasons |= dict.fromkeys(ids[left & ~kept].tolist(), f"not {one.text}")
                left &= kept
            meter.at(meter.done + table.num_rows)
    if len(reasons) == here.sum():
        raise WorkFailed(f"{index.folder}: no sample of {here.sum():,} meets {', '.join(one.text for one in conditions)}")
    write_skips(out, reasons)
    counts = Counter(reasons.values())
    return {one.text: counts[f"not {one.text}"] for one in conditions}
