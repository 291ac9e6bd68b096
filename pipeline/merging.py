"""Several indexes → one, as Open30M is made: equal ids unite with their captions, shards stay where they are."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.console import InputError, WorkFailed
from pipeline.files import alone, homes
from pipeline.groups import Grouped
from pipeline.index import INDEX_NAME, MANIFEST_NAME, Index, manifest_of
from pipeline.indexing import assemble, remove, tars_of
from pipeline.scans import Scanned, scanned
from pipeline.schema import INDEX_BATCH_ROWS
from pipeline.skips import FORGOTTEN_NAME, Forgotten
from pipeline.survival import FORGOTTEN
from pipeline.tars import ROWS


@dataclass(frozen=True)
class Input:
    """An index to unite. weight: how often an epoch should see each of its samples, times its own weights of sources."""

    folder: Path
    weight: float = 1.0


def parse_input(text: str) -> Input:
    """`DIR` or `DIR=WEIGHT` as the command takes it."""
    folder, equals, weight = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return Input(Path(text))
    try:
        return Input(Path(folder), float(weight))
    except ValueError:
        raise InputError(f"{text!r}: {weight!r} is no weight; write DIR or DIR=WEIGHT, as in shards/cc3m=2") from None


@dataclass(frozen=True)
class Part:
    """One shard of an index, without what is forgotten. `name` is seen from the folder of the index that is made."""

    index: Index
    number: int
    name: str
    dropped: np.ndarray

    @property
    def size(self) -> int:
        return self.index.manifest["shards"][self.number]["size"]

    @property
    def sha256(self) -> str:
        return self.index.manifest["shards"][self.number]["sha256"]

    @property
    def sources(self) -> frozenset[str]:
        return frozenset(self.index.manifest["sources"])

    @cached_property
    def _all_ids(self) -> np.ndarray:
        return self.index.columns(np.arange(*self.index.shard_starts[self.number:self.number + 2]))["sample_id"]

    @cached_property
    def _kept(self) -> np.ndarray:
        return ~np.isin(self._all_ids, self.dropped)

    @property
    def gone(self) -> int:
        return int((~self._kept).sum())

    @property
    def sample_id(self) -> np.ndarray:
        return self._all_ids[self._kept]

    def rows(self) -> pa.Table:
        table = rows_between(self.index, *self.index.shard_starts[self.number:self.number + 2])
        table = table.set_column(table.schema.get_field_index("source"), "source", table["source"].cast(pa.string()))
        if "image_sum" not in table.column_names:  # of an older version
            table = table.append_column("image_sum", pa.array(np.zeros(table.num_rows, np.int64)))
        return table.select(ROWS.names).cast(ROWS).filter(pa.array(self._kept))


def rows_between(index: Index, start: int, stop: int) -> pa.Table:
    """Rows start … stop of an index as an Arrow table."""
    first, last = int(start) // INDEX_BATCH_ROWS, -(-int(stop) // INDEX_BATCH_ROWS)
    batches = [index.batch(number) for number in range(first, last)]
    table = pa.Table.from_batches(batches, schema=index.file.schema)
    return table.slice(int(start) - first * INDEX_BATCH_ROWS, int(stop - start)).unify_dictionaries()


def _weights(indexes: list[tuple[Index, float]]) -> dict[str, float]:
    """Source → weight. Raises InputError where one source would have two."""
    weights: dict[str, float] = {}
    for index, weight in indexes:
        if not 0 <= weight < math.inf:
            raise InputError(f"{index.folder}: the weight {weight:g} is no number from 0 on: write DIR=2 or DIR=0.5")
        for source in index.manifest["sources"]:
            own = weight * index.manifest.get("weights", {}).get(source, 1)
            if weights.setdefault(source, own) != own:
                raise InputError(f"source {source!r} would weigh both {weights[source]} and {own}: give its indexes the "
                                 "same weight, or other names with `urls table --source`")
    return weights


def places(folder: Path) -> list[Path]:
    """The folder of an index, and those of the indexes that it was merged from, and so on."""
    found = [folder]
    for place in found:
        if not (told := manifest_of(place)) and (place / MANIFEST_NAME).exists():
            raise InputError(f"{place / MANIFEST_NAME} is damaged, and would say what the index was merged from: `index` or "
                             "`merge` it again, then run the same command")
        below = (place / one["folder"] for one in told.get("merged_from", []))
        found += [one for one in below if all(one.resolve() != known.resolve() for known in found)]
    return found


def scans_below(folder: Path, named: Forgotten) -> Iterator[tuple[Path, Scanned]]:
    """Each tar of an index, or of the folders that it was merged from, and its scan, in which `named` has been looked for.

    Raises InputError where a tar is elsewhere.
    """
    for place in places(folder):
        told = manifest_of(place)
        if "merged_from" in told:
            continue
        names = tars_of(place)
        wanted = {shard["name"] for shard in told.get("shards", [])} if told or place.is_dir() else {"its tars"}
        if missing := sorted(wanted - set(names)):
            raise InputError(f"{place / missing[0]} is not here, but a takedown has to look into it: run the same command "
                             f"where it is, or `uniclip-data index {place}` if it is gone for good")
        yield from ((place / shard.name, shard) for shard in scanned(place, names, None, named))


def merge(out: Path, inputs: list[Input], command: str = "") -> dict:
    """Unite indexes into OUT/index.arrow; returns the manifest. The first index that has an id keeps its image.

    What is forgotten in one of them is left out of all; groups stay. Takedowns wait until it has ended. Raises InputError,
    and WorkFailed where nothing is left.
    """
    with alone({home for place in [out, *(below for one in inputs for below in places(one.folder))] if place.is_dir()
                for home in homes(place)}):
        return merge_locked(out, inputs, command)


def merge_locked(out: Path, inputs: list[Input], command: str = "") -> dict:
    """The same for who is `alone` there."""
    indexes = [(Index.open(one.folder), one.weight) for one in inputs]
    weights = _weights(indexes)
    if (before := manifest_of(out)) and "merged_from" not in before:
        raise InputError(f"{out} holds an index of its own, which merging would replace: give another folder")
    for one in inputs:  # takedowns would no longer find the sources of what was here
        if out.resolve() in {place.resolve() for place in places(one.folder)}:
            raise InputError(f"{one.folder} needs {out}, which merging would replace: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    gone = Forgotten.read(out / FORGOTTEN_NAME)
    for index, _ in indexes:
        gone |= Forgotten.beside(index.folder, index.shards)
    if gone.hashes:
        gone |= Forgotten({one.sample_id: "equal bytes" for folder in dict.fromkeys(index.folder for index, _ in indexes)
                           for _, shard in scans_below(folder, Forgotten({}, gone.hashes)) for one in shard.taken()})
    shards = [Part(index, number, seen_from(out, index.folder / name), gone.id_array)
              for index, _ in indexes for number, name in enumerate(index.shards)]
    left = sum(shard.gone for shard in shards)
    if not sum(len(shard.sample_id) for shard in shards):
        remove(out)
        raise WorkFailed(f"{out}: no sample is left of {len(inputs)} indexes")
    if gone.ids:  # read again: a takedown may have added to the list meanwhile
        (gone | Forgotten.read(out / FORGOTTEN_NAME)).write(out / FORGOTTEN_NAME)
    more = {"weights": weights, "merged_from": [
        {"folder": os.path.relpath(index.folder, out), "fingerprint": index.fingerprint, "samples": len(index),
         "weight": weight, "excluded": index.manifest["counts"]["excluded"]} for index, weight in indexes]}
    groups = [part for index, _ in indexes if (part := Grouped.read(index.folder / INDEX_NAME, index.manifest))]
    return assemble(out, shards, {FORGOTTEN: left} if left else {}, command, more, groups)


def seen_from(folder: Path, shard: Path) -> str:
    """The relative path of a shard from a folder."""
    return Path(os.path.relpath(shard.absolute(), folder.absolute())).as_posix()
