"""Is one model better than another? A paired test for each number that both have, query by query.

McNemar's exact test where queries are independent outcomes; where captions share an image, or classes are averaged,
whole images are swapped between the models at random. p is corrected for the number of comparisons (Holm).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from evaluation import outcomes
from evaluation.evaluate import RESULTS
from evaluation.outcomes import Outcome
from evaluation.results import Row, read_rows
from evaluation.statistics import Interval, bootstrap
from pipeline.console import InputError, existing

SAME = ("dataset", "split", "task", "protocol", "metric", "data_sha256", "prompts_sha256")
SWAPS, BLOCK, SEED, LEVEL = 10_000, 100, 0, 0.05


@dataclass(frozen=True)
class Comparison:
    """B minus A on one number, with its 95 % interval; p is Holm's once `holm` was applied."""

    row: Row
    a: float
    b: float
    interval: Interval
    p: float
    test: str

    @property
    def better(self) -> str:
        """The model that may be called better, "–" where no difference is shown."""
        return "–" if self.p >= LEVEL else "B" if self.b > self.a else "A"


def compare(a: Path, b: Path, every: bool = False) -> list[Comparison]:
    """The comparisons of two results files or run folders, main metrics only unless `every`.

    Raises InputError when nothing was measured alike on both.
    """
    files = [path / RESULTS if path.is_dir() else path for path in (a, b)]
    rows_a, rows_b = (_latest(read_rows(existing(file, "results file"))) for file in files)
    found = [_paired(files[0].parent / rows_a[key]["outcomes"], files[1].parent / rows_b[key]["outcomes"], rows_a[key])
             for key in rows_a if key in rows_b and (every or rows_a[key]["main_metric"])]
    if not found:
        raise InputError(f"{files[0]} and {files[1]} have no number in common, on the same data, prompts and protocol: "
                         "run `uniclip-eval suite` with both models on the same sets")
    return list(holm(found))


def _latest(rows: list[Row]) -> dict[tuple, Row]:
    """The last row of each measurement, by what must be the same."""
    return {tuple(row.get(name) for name in SAME): row for row in rows if row.get("outcomes")}


def _paired(a: Path, b: Path, row: Row) -> Comparison:
    for path in (a, b):
        existing(path, "outcomes file", "measure the set again")
    before, after = (outcomes.outcome(row["metric"], outcomes.read(path)) for path in (a, b))
    return paired(before, after, row)


def paired(a: Outcome, b: Outcome, row: Row) -> Comparison:
    """The test of two outcomes of the same queries."""
    unit_Q = a.unit_Q
    units = int(unit_Q.max()) + 1
    interval = bootstrap(lambda weight_U: b.value(weight_U[unit_Q]) - a.value(weight_U[unit_Q]), units, SEED)
    independent = a.over == "queries" or (a.over == "images" and units == len(unit_Q))
    p = _mcnemar(a, b) if independent else _swapped(a, b, unit_Q, units)
    return Comparison(row, a.value(), b.value(), interval, p, "McNemar" if independent else "swapped images")


def _mcnemar(a: Outcome, b: Outcome) -> float:
    only_a, only_b = int((a.hit_Q & ~b.hit_Q).sum()), int((b.hit_Q & ~a.hit_Q).sum())
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def _swapped(a: Outcome, b: Outcome, unit_Q: np.ndarray, units: int) -> float:
    """Share of random swaps of the models, image by image, with at least the difference seen."""
    share_Q = 1.0 / np.bincount(a.group_Q)[a.group_Q] if a.over == "classes" else np.ones(len(unit_Q))
    gain_U = np.bincount(unit_Q, share_Q * (b.hit_Q.astype(float) - a.hit_Q), units)
    rng, seen, extreme = np.random.default_rng(SEED), abs(gain_U.sum()) - 1e-9, 0
    for _ in range(SWAPS // BLOCK):
        sign_BU = rng.integers(0, 2, (BLOCK, units), np.int8) * 2.0 - 1
        extreme += int((np.abs(sign_BU @ gain_U) >= seen).sum())
    return (extreme + 1) / (SWAPS + 1)


def holm(found: list[Comparison]) -> Iterator[Comparison]:
    """The same comparisons with p corrected for their number (Holm 1979), so that one false alarm among all is rare."""
    order = sorted(range(len(found)), key=lambda i: found[i].p)
    corrected, last = {}, 0.0
    for place, i in enumerate(order):
        last = max(last, min(1.0, found[i].p * (len(found) - place)))
        corrected[i] = last
    return (replace(comparison, p=corrected[i]) for i, comparison in enumerate(found))
