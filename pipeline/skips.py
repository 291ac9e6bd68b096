"""Skip lists: samples that leave the order while the shards stay as they are. One list, forgotten.parquet, is for ever."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.console import InputError, existing
from pipeline.files import replacing
from pipeline.schema import SKIPS
from pipeline.stores import Store

FORGOTTEN_NAME = "forgotten.parquet"  # beside the shards, or beside a merged index


def write_skips(path: Path, reasons: dict[int, str]) -> None:
    """A skip list (schema.SKIPS) of sample id → reason, ascending."""
    ids = sorted(reasons)
    with replacing(path) as temporary:
        pq.write_table(pa.table([ids, [reasons[one] for one in ids]], schema=SKIPS), temporary)


def read_skips(path: Path) -> dict[int, str]:
    """Sample id → reason. Raises InputError."""
    try:
        table = pq.read_table(existing(path, "the skip list"), columns=SKIPS.names)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"skip list {path} cannot be read ({error})") from None
    return dict(zip(table["sample_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


def forgotten(folder: Path) -> dict[int, str]:
    """What takedowns have taken out of `folder`: sample id → reason."""
    path = folder / FORGOTTEN_NAME
    return read_skips(path) if path.exists() else {}


def forgotten_ids(store: Store) -> np.ndarray:
    """The same, as ids alone, of a download's folder and of the folder that it retries."""
    ids = [np.empty(0, np.int64)]
    if store.local:
        ids += [np.fromiter(forgotten(folder), np.int64) for folder in (store.local, store.local.parent)]
    elif store.exists(FORGOTTEN_NAME):
        ids.append(pq.read_table(pa.BufferReader(store.read(FORGOTTEN_NAME)))["sample_id"].to_numpy())
    return np.unique(np.concatenate(ids))
