"""Skip lists: samples that leave the order while the shards stay as they are. One list, forgotten.parquet, is for ever."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import parquet
from pipeline.console import InputError, existing
from pipeline.schema import FORGOTTEN, SKIPS
from pipeline.seals import UNREADABLE
from pipeline.stores import Store

if TYPE_CHECKING:
    from pipeline.index import Index
    from pipeline.tars import Known

FORGOTTEN_NAME = "forgotten.parquet"  # beside the shards, or beside a merged index


def write_skips(path: Path, reasons: dict[int, str]) -> None:
    """A skip list (schema.SKIPS) of sample id → reason, ascending."""
    ids = sorted(reasons)
    parquet.write(path, pa.table([ids, [reasons[one] for one in ids]], schema=SKIPS))


def _of(source: Path | bytes, name: str) -> pa.Table:
    try:
        return parquet.read(source)[0].read()
    except UNREADABLE as error:
        raise InputError(f"skip list {name} is no Parquet file, or it is damaged ({error}): put a copy back, or remove it and "
                         "make it again") from None


def _read(path: Path) -> pa.Table:
    """With the columns of schema.SKIPS at least. Raises InputError."""
    table = _of(existing(path, "the skip list"), str(path))
    if missing := set(SKIPS.names) - set(table.column_names):
        raise InputError(f"skip list {path} has no column {min(missing)!r}: write it with `uniclip-data filter`")
    return table


def read_skips(path: Path) -> dict[int, str]:
    """Sample id → reason. Raises InputError."""
    table = _read(path)
    return dict(zip(table["sample_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


@dataclass(frozen=True)
class Forgotten:
    """What takedowns have taken out, each with its reason: sample ids; sha256 of originals or of stored images."""

    ids: dict[int, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def __or__(self, other: "Forgotten") -> "Forgotten":
        """Both; the first reason stays."""
        return Forgotten({**other.ids, **self.ids}, {**other.hashes, **self.hashes})

    @cached_property
    def id_array(self) -> np.ndarray:
        return np.fromiter(self.ids, np.int64)

    @cached_property
    def _sums(self) -> pa.Array:
        return pa.array([bytes.fromhex(one) for one in self.hashes], pa.binary(32))

    def mask(self, rows: pa.Table) -> np.ndarray:
        """Which rows with the columns sample_id, sha256 and original (tars.SCANNED) are meant."""
        gone = np.isin(rows["sample_id"].to_numpy(), self.id_array)
        for name in ("sha256", "original") if self.hashes else ():
            hit = pc.is_in(rows[name], value_set=self._sums)  # pyright: ignore[reportAttributeAccessIssue]
            gone |= hit.to_numpy().astype(bool)
        return gone

    def names(self, one: "Known") -> bool:
        """Whether this sample is meant."""
        return one.sample_id in self.ids or one.sha256 in self.hashes or one.original in self.hashes

    @classmethod
    def read(cls, path: Path) -> "Forgotten":
        """The list at `path`, empty where there is none. Raises InputError."""
        return cls.of(_read(path)) if path.exists() else cls()

    @classmethod
    def of(cls, table: pa.Table) -> "Forgotten":
        """A list that was read; older ones name no hashes."""
        sums = table["sha256"].to_pylist() if "sha256" in table.column_names else [None] * table.num_rows
        reasons = table["reason"].to_pylist()
        return cls(dict(zip(table["sample_id"].to_pylist(), reasons, strict=True)),
                   {one: reason for one, reason in zip(sums, reasons, strict=True) if one})

    @classmethod
    def beside(cls, folder: Path, tars: Iterable[str] = ()) -> "Forgotten":
        """All lists that bind `folder`: its own, those of the folders above it, and those on the way to its tars.

        Of tars that are links those on the way to where they really are, too.
        """
        names = list(tars)
        within = {parent for name in names for parent in PurePosixPath(name).parents}
        real = {(folder / name).resolve().parent for name in names}
        above = [*folder.absolute().parents, *sorted({parent for one in real for parent in (one, *one.parents)})]
        folders = dict.fromkeys([folder, *above, *(folder / part for part in sorted(within))])
        return reduce(or_, (Forgotten.read(one / FORGOTTEN_NAME) for one in folders))

    def write(self, path: Path) -> None:
        """As schema.FORGOTTEN, ascending."""
        of_bytes = {one: int(one[:16], 16) >> 1 for one in sorted(self.hashes)}
        ids = sorted(self.ids.keys() - of_bytes.values())
        columns = [[*ids, *of_bytes.values()], [*(self.ids[one] for one in ids), *(self.hashes[one] for one in of_bytes)],
                   [*(None for _ in ids), *of_bytes]]
        parquet.write(path, pa.table(columns, schema=FORGOTTEN))


def forgotten(folder: Path) -> dict[int, str]:
    """What takedowns have taken out of `folder`: sample id → reason."""
    return Forgotten.read(folder / FORGOTTEN_NAME).ids


def present(index: "Index") -> np.ndarray:
    """The rows of an index that no takedown has named since it was made."""
    rows, gone = np.arange(len(index)), Forgotten.beside(index.folder, index.shards).id_array
    return rows[~np.isin(index.columns(rows)["sample_id"], gone)] if len(gone) else rows


def forgotten_in(store: Store) -> Forgotten:
    """What a download must neither ask for nor store."""
    if store.local:
        return Forgotten.beside(store.local)
    if not store.exists(FORGOTTEN_NAME):
        return Forgotten()
    return Forgotten.of(_of(store.read(FORGOTTEN_NAME), f"{store}/{FORGOTTEN_NAME}"))


def forgotten_ids(store: Store) -> np.ndarray:
    """The same, as ids alone."""
    return forgotten_in(store).id_array
