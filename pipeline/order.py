"""(seed, epoch, position) → row of the index: the shuffle, as a pure function.

Shards are permuted, consecutive shards form windows of at least `window_rows` rows, rows are shuffled inside their
window: reads stay local, memory is one window, and any position of any epoch is found without walking there.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.sampling import ROW_STREAM, SHARD_STREAM, uniforms

WINDOW_ROWS = 65_536


def _shuffled(items: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    """`items` sorted by a random number each owns: the order does not depend on who else is sorted."""
    return items[np.argsort(uniforms(seed, epoch, 0, items, stream, 0, 1)[0], kind="stable")]


@dataclass(frozen=True)
class Order:
    """The order of one index. shard_starts: (S+1,) first row of each shard, and the number of rows."""

    seed: int
    shard_starts: tuple[int, ...]
    window_rows: int = WINDOW_ROWS

    def __len__(self) -> int:
        return self.shard_starts[-1]

    def rows(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and epochs of `count` samples from global position `position` on → two (count,) int64 arrays.

        Epochs join without padding or dropping. Raises ValueError on an empty index.
        """
        if len(self) == 0:
            raise ValueError("an empty index has no order")
        parts, epochs = [], []
        while count > 0:
            epoch, at = divmod(position, len(self))
            window_rows, window_start = _window_at(self, epoch, at)
            part = window_rows[at - window_start :][:count]
            parts.append(part)
            epochs.append(np.full(len(part), epoch, np.int64))
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts), np.concatenate(epochs)


@lru_cache(maxsize=4)
def _epoch_plan(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Permuted shards, first shard of each window (ends with S), first position of each window (ends with the length)."""
    starts = np.array(order.shard_starts)
    shards = _shuffled(np.arange(len(starts) - 1), order.seed, epoch, SHARD_STREAM)
    ends = np.cumsum(np.diff(starts)[shards])
    cuts, filled = [0], 0
    for place, end in enumerate(ends.tolist(), start=1):
        if end - filled >= order.window_rows:
            cuts.append(place)
            filled = end
    if cuts[-1] != len(shards):
        cuts.append(len(shards))
    positions = np.concatenate([[0], ends])[cuts]
    return shards, np.array(cuts), positions


@lru_cache(maxsize=4)
def _window(order: Order, epoch: int, window: int) -> np.ndarray:
    shards, cuts, _ = _epoch_plan(order, epoch)
    starts = order.shard_starts
    rows = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[cuts[window] : cuts[window + 1]]])
    return _shuffled(rows, order.seed, epoch, ROW_STREAM)


def _window_at(order: Order, epoch: int, position: int) -> tuple[np.ndarray, int]:
    """The shuffled rows of the window that holds `position` of `epoch`, and that window's first position."""
    _, _, positions = _epoch_plan(order, epoch)
    window = int(np.searchsorted(positions, position, side="right")) - 1
    return _window(order, epoch, window), int(positions[window])
