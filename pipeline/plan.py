"""Which rows of an index an epoch holds, and how often: weights of sources, and skip lists.

A source of weight w gives each of its rows ⌊w⌋ times an epoch, and for the fraction a subset drawn anew every epoch.
A skip list is a Parquet file with a column `sample_id` (urls.parquet is one): its rows leave, the shards stay as they are.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import parquet
from pipeline.console import InputError
from pipeline.index import Index
from pipeline.schema import INDEX_BATCH_ROWS
from pipeline.seals import UNREADABLE

MAX_WEIGHT = 255  # the sampler tells 256 occurrences of a sample apart
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Plan:
    """What an epoch holds of S shards and C sources.

    shard_starts (S+1,): first row of each shard, and the number of rows; skipped: rows that left, ascending;
    weight_C; kept_SC: rows of each shard and source that stayed; source_of: rows (n,) → sources (n,).
    """

    shard_starts: np.ndarray
    skipped: np.ndarray
    weight_C: np.ndarray
    kept_SC: np.ndarray
    source_of: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def whole(cls, shard_starts: np.ndarray) -> "Plan":
        """Every row once."""
        starts = np.asarray(shard_starts, np.int64)
        return cls(starts, _NONE, np.ones(1), np.diff(starts)[:, None], np.zeros_like)

    @cached_property
    def times_C(self) -> np.ndarray:
        """How often every row of a source comes in every epoch."""
        return np.floor(self.weight_C).astype(np.int64)

    @cached_property
    def even(self) -> bool:
        """Whether every row that stayed comes exactly once."""
        return bool((self.weight_C == 1).all())

    @cached_property
    def _length(self) -> int:
        return int((self.times_C * self.kept_SC).sum() + self.extra(np.arange(len(self.kept_SC))).sum())

    def __len__(self) -> int:
        """Samples in an epoch; every epoch has as many."""
        return self._length

    def extra(self, shards: np.ndarray) -> np.ndarray:
        """Rows that each shard gives once more for its sources' fractions, in this order of all shards → (S, C).

        Rounded so that any run of shards gives its share to within one row: the sum is the same in every order.
        """
        kept_SC = np.cumsum(np.vstack([np.zeros_like(self.weight_C, np.int64), self.kept_SC[shards]]), axis=0)
        return np.diff(np.floor(kept_SC * (self.weight_C - self.times_C) + 0.5).astype(np.int64), axis=0)

    def rows(self, shard: int) -> np.ndarray:
        """The rows of a shard that stayed."""
        first, last = self.shard_starts[shard], self.shard_starts[shard + 1]
        gone = self.skipped[slice(*np.searchsorted(self.skipped, (first, last)))]
        return np.delete(np.arange(first, last), gone - first)


def effective_weights(index: Index, weights: dict[str, float]) -> dict[str, float]:
    """A run's weights of sources: what it says itself, and else what `merge` was told."""
    return {**index.manifest.get("weights", {}), **weights}


def make_plan(index: Index, weights: dict[str, float] | None = None, skip_ids: np.ndarray | None = None) -> Plan:
    """The plan of an index; sources that `weights` does not name weigh 1. Raises InputError.

    skip_ids: ascending sample ids, from `read_skip_lists`. Costs a pass over the columns that matter, nothing otherwise.
    """
    sources = index.manifest["sources"]
    for name, weight in (weights or {}).items():
        if name not in sources:
            raise InputError(f"data.weights names the source {name!r}, which {index.folder} has not: it has "
                             f"{', '.join(map(repr, sources))}")
        if not 0 <= weight <= MAX_WEIGHT:
            raise InputError(f"data.weights: {name} = {weight} is not in 0 … {MAX_WEIGHT}")
    weight_C = np.array([(weights or {}).get(name, 1.0) for name in sources])
    skipped = _NONE if skip_ids is None or not len(skip_ids) else rows_of(index, skip_ids)
    plan = Plan.whole(index.shard_starts)
    if not (weight_C == 1).all():
        plan = Plan(plan.shard_starts, skipped, weight_C, _count(index, skipped, len(sources)), _sources_of(index))
    elif len(skipped):
        gone_S = np.diff(np.searchsorted(skipped, plan.shard_starts))
        plan = Plan(plan.shard_starts, skipped, plan.weight_C, plan.kept_SC - gone_S[:, None], plan.source_of)
    if len(plan) == 0:
        raise InputError(f"{index.folder}: no sample is left of {len(index):,} ({len(skipped):,} skipped): "
                         "check data.skip and data.weights")
    return plan


def _sources_of(index: Index) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: index.columns(rows)["source"].astype(np.int64)


def _chunks(index: Index) -> list[np.ndarray]:
    """All rows, in pieces that one record batch holds."""
    return [np.arange(start, min(start + INDEX_BATCH_ROWS, len(index))) for start in range(0, len(index), INDEX_BATCH_ROWS)]


def rows_of(index: Index, sorted_ids: np.ndarray) -> np.ndarray:
    """Rows whose sample id is in `sorted_ids`, ascending."""
    found = []
    for rows in _chunks(index):
        ids = index.columns(rows)["sample_id"]
        at = np.minimum(np.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
        found.append(rows[sorted_ids[at] == ids])
    return np.concatenate(found) if found else _NONE


def find_sample(index: Index, sample_id: int) -> int | None:
    """The row of a sample id."""
    found = rows_of(index, np.array([sample_id], np.int64))
    return int(found[0]) if len(found) else None


def _count(index: Index, skipped: np.ndarray, sources: int) -> np.ndarray:
    """Rows of each shard and source that stayed → (S, C)."""
    shards = len(index.shard_starts) - 1
    counts = np.zeros(shards * sources, np.int64)
    for rows in [*_chunks(index), skipped]:
        columns = index.columns(rows)
        cells = np.bincount(columns["shard"].astype(np.int64) * sources + columns["source"], minlength=len(counts))
        counts += -cells if rows is skipped else cells
    return counts.reshape(shards, sources)


def read_skip_lists(paths: tuple[Path, ...]) -> np.ndarray:
    """The sample ids of all lists, each once, ascending. Raises InputError."""
    ids = [_NONE]
    for path in paths:
        try:
            column = parquet.read(path)[0].read(["sample_id"])["sample_id"]
        except UNREADABLE as error:
            raise InputError(f"skip list {path} cannot be read ({error}): give a Parquet file with an int64 column sample_id"
                             ) from None
        if column.type != pa.int64():
            raise InputError(f"skip list {path}: sample_id is {column.type}, not int64")
        ids.append(column.drop_null().to_numpy())
    return np.unique(np.concatenate(ids))


def digest(skip_ids: np.ndarray) -> str:
    """Hash of a skip list's ids, whatever files they came in."""
    return hashlib.sha256(skip_ids.astype("<i8").tobytes()).hexdigest()
