"""Evaluation sets from indexed shards."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.console import InputError, WorkFailed, track
from pipeline.evalsets import RETRIEVAL, write_evalset
from pipeline.index import Index
from pipeline.reader import ShardReader
from pipeline.skips import present

ROWS_AT_ONCE = 1024


def from_index(folder: Path, out: Path, split: str) -> int:
    """Write the samples of an index that are not taken down as OUT/SPLIT of a retrieval set, bytes as they are → their number.

    Raises InputError when the split is there already or an image is neither JPEG, PNG nor WebP; WorkFailed when a
    shard does not hold what the index says.
    """
    index = Index.open(folder)
    left = present(index)
    if not len(left):
        raise InputError(f"index {folder} holds no usable sample")
    return write_evalset(out, split, track(_pairs(index, left), "writing", len(left)), RETRIEVAL)


def _pairs(index: Index, left: np.ndarray) -> Iterator[tuple[bytes, list[str]]]:
    reader = ShardReader(index.folder, index.shards)
    try:
        for begin in range(0, len(left), ROWS_AT_ONCE):
            rows = left[begin:begin + ROWS_AT_ONCE]
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
