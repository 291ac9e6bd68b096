"""Evaluation sets from indexed shards."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.console import InputError, WorkFailed, track
from pipeline.evalsets import RETRIEVAL, write_evalset
from pipeline.index import Index
from pipeline.reader import ShardReader

ROWS_AT_ONCE = 1024


def from_index(folder: Path, out: Path, split: str) -> int:
    """Write the samples of an index as OUT/SPLIT of a retrieval set, bytes as they are → their number.

    Raises InputError when the split is there already or an image is neither JPEG, PNG nor WebP; WorkFailed when a
    shard does not hold what the index says.
    """
    index = Index.open(folder)
    if not len(index):
        raise InputError(f"index {folder} holds no usable sample")
    return write_evalset(out, split, track(_pairs(index), "writing", len(index)), RETRIEVAL)


def _pairs(index: Index) -> Iterator[tuple[bytes, list[str]]]:
    reader = ShardReader(index.folder, index.shards)
    try:
        for begin in range(0, len(index), ROWS_AT_ONCE):
            rows = np.arange(begin, min(begin + ROWS_AT_ONCE, len(index)))
            columns = index.columns(rows)
            places = zip(rows.tolist(), *(columns[name].tolist() for name in ("shard", "offset", "size")), strict=True)
            for row, shard, offset, size in places:
                try:
                    data = reader.read(shard, offset, size)
                except OSError as error:
                    raise WorkFailed(f"{index.folder / index.shards[shard]}, key {index.key(row)}: {error}; "
                                     "index the shards again") from None
                yield data, index.captions(row)
    finally:
        reader.close()
