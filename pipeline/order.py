"""(seed, epoch, position) → row of the index: the shuffle, as a pure function.

Shards are permuted, consecutive shards form windows of at least `window_rows` samples, samples are shuffled inside their
window: reads stay local, memory is one window, and any position of any epoch is found without walking there.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline.plan import Plan
from pipeline.sampling import ROW_STREAM, SHARD_STREAM, SUBSET_STREAM, uniforms

WINDOW_ROWS = 65_536


class Places(NamedTuple):
    """Samples in their order: row of the index, epoch, and which occurrence of the row in its epoch → (n,) int64 each."""

    rows: np.ndarray
    epochs: np.ndarray
    repeats: np.ndarray


class _EpochPlan(NamedTuple):
    shards: np.ndarray     # permuted
    cuts: np.ndarray       # first place of each window in `shards`; ends with S
    positions: np.ndarray  # first position of each window; ends with the epoch's length
    extra_SC: np.ndarray   # rows each place of `shards` gives once more, by source


@dataclass(frozen=True, eq=False)
class Order:
    """The order of the samples that a plan holds."""

    seed: int
    plan: Plan
    window_rows: int = WINDOW_ROWS

    def __len__(self) -> int:
        return len(self.plan)

    def places(self, position: int, count: int) -> Places:
        """`count` samples from global position `position` on.

        Epochs join without padding or dropping. Raises ValueError on an empty plan.
        """
        if len(self) == 0:
            raise ValueError("an empty index has no order")
        parts = []
        while count > 0:
            epoch, at = divmod(position, len(self))
            window = _window_of(self, epoch, at)
            rows, repeats = _window(self, epoch, window)
            chosen = slice(at - int(_epoch_plan(self, epoch).positions[window]), None)
            rows, repeats = rows[chosen][:count], repeats[chosen][:count]
            parts.append((rows, np.full(len(rows), epoch, np.int64), repeats))
            position, count = position + len(rows), count - len(rows)
        return Places(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def window_shards(self, position: int) -> tuple[int, ...]:
        """The shards of the window that holds a position, then those of the window after it: what to have at hand."""
        epoch, at = divmod(position, len(self))
        window = _window_of(self, epoch, at)
        after = (epoch, window + 1) if window + 2 < len(_epoch_plan(self, epoch).cuts) else (epoch + 1, 0)
        return tuple(int(shard) for e, w in ((epoch, window), after) for shard in _shards(self, e, w))


def _by_own_number(order: Order, epoch: int, rows: np.ndarray, repeats: np.ndarray | int, stream: int) -> np.ndarray:
    """What sorts items by a random number each owns: their order does not depend on who else is sorted."""
    return np.argsort(uniforms(order.seed, epoch, repeats, rows, stream, 0, 1)[0], kind="stable")


@lru_cache(maxsize=4)
def _epoch_plan(order: Order, epoch: int) -> _EpochPlan:
    plan = order.plan
    shards = _by_own_number(order, epoch, np.arange(len(plan.kept_SC)), 0, SHARD_STREAM)
    extra_SC = plan.extra(shards)
    ends = np.cumsum((plan.kept_SC[shards] * plan.times_C + extra_SC).sum(1))
    cuts, filled = [0], 0
    for place, end in enumerate(ends.tolist(), start=1):
        if end - filled >= order.window_rows:
            cuts.append(place)
            filled = end
    if cuts[-1] != len(shards):
        cuts.append(len(shards))
    return _EpochPlan(shards, np.array(cuts), np.concatenate([[0], ends])[cuts], extra_SC)


def _window_of(order: Order, epoch: int, position: int) -> int:
    """The window that holds `position` of `epoch`."""
    return int(np.searchsorted(_epoch_plan(order, epoch).positions, position, side="right")) - 1


def _shards(order: Order, epoch: int, window: int) -> np.ndarray:
    planned = _epoch_plan(order, epoch)
    return planned.shards[planned.cuts[window] : planned.cuts[window + 1]]


@lru_cache(maxsize=4)
def _window(order: Order, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The shuffled (rows, repeats) of a window."""
    planned = _epoch_plan(order, epoch)
    first = planned.cuts[window]
    parts = [_occurrences(order, epoch, int(shard), planned.extra_SC[first + n])
             for n, shard in enumerate(_shards(order, epoch, window))]
    rows, repeats = (np.concatenate(column) for column in zip(*parts, strict=True))
    shuffled = _by_own_number(order, epoch, rows, repeats, ROW_STREAM)
    return rows[shuffled], repeats[shuffled]


def _occurrences(order: Order, epoch: int, shard: int, extra_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The (rows, repeats) that a shard gives to an epoch."""
    plan = order.plan
    rows = plan.rows(shard)
    if plan.even:
        return rows, np.zeros(len(rows), np.int64)
    source = plan.source_of(rows)
    times = plan.times_C[source]
    for c in np.flatnonzero(extra_C):
        mine = np.flatnonzero(source == c)
        times[mine[_by_own_number(order, epoch, rows[mine], 0, SUBSET_STREAM)[: extra_C[c]]]] += 1
    before = np.cumsum(times) - times
    return np.repeat(rows, times), np.arange(times.sum()) - np.repeat(before, times)
