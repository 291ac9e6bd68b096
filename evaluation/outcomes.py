"""What happened to each query: kept beside the results, so that two models can be compared query by query.

Q queries, U independent units (images), N images.
"""

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from evaluation.results import Measured
from evaluation.statistics import bootstrap, wilson
from pipeline.console import InputError
from pipeline.files import replacing
from pipeline.seals import has_trailer, with_trailer, without_trailer
from trainer.metrics import KS

# Metric → whose ranks, the K a rank must be below, how the queries are averaged.
METRICS: dict[str, tuple[str, int, str]] = {
    "accuracy": ("class", 1, "queries"), "accuracy@5": ("class", 5, "queries"),
    "mean_per_class_recall": ("class", 1, "classes"),
    **{f"image_to_text_recall@{k}": ("image", k, "queries") for k in KS},
    **{f"text_to_image_recall@{k}": ("text", k, "images") for k in KS}}

Ranks = dict[str, tuple[np.ndarray, np.ndarray]]  # whose → ranks (Q,), groups (Q,): the label or the image of each


@dataclass(frozen=True)
class Outcome:
    """hit_Q: whether each query succeeded; group_Q: its class or its image; over: a key of AVERAGES."""

    hit_Q: np.ndarray
    group_Q: np.ndarray
    over: str

    @property
    def unit_Q(self) -> np.ndarray:
        """The independent unit of each query: captions of one image share theirs."""
        return np.unique(self.group_Q, return_inverse=True)[1] if self.over == "images" else np.arange(len(self.hit_Q))

    def value(self, weight_Q: np.ndarray | None = None) -> float:
        """The metric, or what it would be had query q been drawn weight_Q[q] times."""
        weight_Q = np.ones(len(self.hit_Q)) if weight_Q is None else weight_Q
        return AVERAGES[self.over](self.hit_Q, self.group_Q, weight_Q)


def _over_queries(hit_Q: np.ndarray, group_Q: np.ndarray, weight_Q: np.ndarray) -> float:
    return float(weight_Q @ hit_Q / weight_Q.sum())


def _over_classes(hit_Q: np.ndarray, group_Q: np.ndarray, weight_Q: np.ndarray) -> float:
    """Classes without images, or not drawn, are left out."""
    drawn_C = np.bincount(group_Q, weights=weight_Q)
    return float((np.bincount(group_Q, weights=weight_Q * hit_Q)[drawn_C > 0] / drawn_C[drawn_C > 0]).mean())


AVERAGES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], float]] = {
    "queries": _over_queries, "images": _over_queries, "classes": _over_classes}


def outcome(metric: str, ranks: Ranks) -> Outcome:
    """The outcome a metric is about."""
    whose, k, over = METRICS[metric]
    rank_Q, group_Q = ranks[whose]
    return Outcome(rank_Q < k, group_Q, over)


def measured(metric: str, ranks: Ranks, chance: float, main_metric: bool, seed: int) -> Measured:
    """The number with its interval: Wilson's where queries are independent, else units are redrawn."""
    found = outcome(metric, ranks)
    unit_Q, n = found.unit_Q, len(found.hit_Q)
    units = int(unit_Q.max()) + 1
    if found.over != "classes" and units == n:
        interval = wilson(int(found.hit_Q.sum()), n)
    else:
        interval = bootstrap(lambda weight_U: found.value(weight_U[unit_Q]), units, seed)
        if interval[0] == interval[1]:  # every class all right or all wrong: redrawing shows no doubt, which is not certainty
            size_C = np.unique(found.group_Q, return_counts=True)[1]
            as_many = units if found.over != "classes" else len(size_C) ** 2 / (1 / size_C).sum()
            interval = wilson(found.value() * as_many, as_many)
    return Measured(metric, n, found.value(), interval, chance, main_metric)


def store(path: Path, ranks: Ranks) -> None:
    """Write ranks and groups as a compressed npz."""
    arrays = {f"{whose}_{what}": values.astype(np.int32)
              for whose, pair in ranks.items() for what, values in zip(("rank", "group"), pair, strict=True)}
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    with replacing(path) as temporary:
        temporary.write_bytes(with_trailer(file.getvalue()))


def read(path: Path) -> Ranks:
    """What `store` wrote. Raises InputError."""
    try:
        data = path.read_bytes()
        data = without_trailer(data) if has_trailer(data) else data
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name.removesuffix("_rank"): (arrays[name], arrays[name.removesuffix("rank") + "group"])
                    for name in arrays.files if name.endswith("_rank")}
    except (OSError, ValueError, KeyError, BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it and its rows from the results file, and measure the set again"
                         ) from None
