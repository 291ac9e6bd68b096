"""Any folder of WebDataset tars → index.arrow + manifest.json: every tar scanned, equal ids united."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import arrows
from pipeline.console import InputError, WorkFailed, err, existing
from pipeline.files import alone, homes, replacing
from pipeline.groups import Carried, Grouped, carried
from pipeline.index import INDEX_NAME, MANIFEST_NAME, PREVIOUS_NAME, manifest_of
from pipeline.members import shown
from pipeline.samples import PACKED
from pipeline.scans import Scanned, scanned
from pipeline.schema import INDEX, INDEX_BATCH_ROWS, SCHEMA_VERSION
from pipeline.seals import UNREADABLE, sealed_json, write_sealed_json
from pipeline.skips import Forgotten
from pipeline.survival import FORGOTTEN
from pipeline.tars import ROWS, is_utf8

QUARANTINE_NAME = "quarantine.jsonl"
NOT_THE_SAMPLES = ("group", "image_sum")  # columns that the fingerprint leaves out: older indexes had other ones, or none
_MAX_SOURCES = 32_767  # codes are int16; a `source` that differs more often than that names no source


class Shard(Protocol):
    """What an index is made of: a tar and its rows (schema ROWS), sorted by key."""

    @property
    def name(self) -> str: ...
    @property
    def sample_id(self) -> np.ndarray: ...
    @property
    def sources(self) -> frozenset[str]: ...
    @property
    def size(self) -> int: ...
    @property
    def sha256(self) -> str: ...

    def rows(self) -> pa.Table: ...


def tars_of(folder: Path) -> list[str]:
    """Paths relative to the folder, sorted; hidden and `_…` folders hold unfinished work. Raises InputError."""
    names = []
    for path in folder.rglob("*.tar"):
        relative = path.relative_to(folder)
        if path.is_dir() or any(part[0] in "._" for part in relative.parts):
            continue
        if not path.exists():
            raise InputError(f"{path} is a link to nothing: put its tar back, or remove the link")
        if not is_utf8(str(relative)):
            raise InputError(f"{str(path).encode('utf-8', 'backslashreplace').decode()}: the name is not UTF-8: rename it")
        names.append(relative.as_posix())
    return sorted(names)


def _tars(folder: Path) -> list[str]:
    """The tars, after a word on files that are probably tars and are not read. Raises InputError where there is no tar."""
    names, unread = tars_of(folder), _unread(folder)
    told = f"{', '.join(unread[:3])}{f' and {len(unread) - 3:,} more' if len(unread) > 3 else ''}"
    cure = "unpack what is compressed, and let names end in .tar"
    if not names:
        raise InputError(f"{folder} holds no .tar file" + (f", but {told}: {cure}" if unread else
                         ": give the folder that `uniclip-data download` wrote, or any folder of WebDataset tars"))
    if unread:
        err.print(f"warning: {folder}: {told} not read: {cure}", style="yellow", markup=False)
    return names


def _unread(folder: Path) -> list[str]:
    """Names of compressed tars, and of tars in other letters than `.tar`."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.name.endswith(".tar"))
    return [shown(path.as_posix()) for path in paths if (PACKED.search(path.name) or path.name.lower().endswith(".tar"))
            and not any(part[0] in "._" for part in path.parts) and (folder / path).is_file()]


def _twins(sample_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, first): each row whose id occurred before, and the row of its first occurrence. Ascending in rows."""
    order = np.argsort(sample_id, kind="stable")
    ordered = sample_id[order]
    starts = np.r_[True, ordered[1:] != ordered[:-1]]
    first = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    rows, first = order[~starts], first[~starts]
    ascending = np.argsort(rows)
    return rows[ascending], first[ascending]


def _united(shards: Sequence[Shard]) -> Iterator[pa.Table]:
    """Each shard's rows without those that repeat an id; their captions go to the first row of that id."""
    starts = np.cumsum([0, *(len(shard.sample_id) for shard in shards)])
    repeated, first = _twins(np.concatenate([shard.sample_id for shard in shards]))
    owner, home = (np.searchsorted(starts, rows, "right") - 1 for rows in (repeated, first))
    gained: dict[int, dict[int, list[str]]] = {}  # shard → its row → captions from elsewhere
    for number in np.unique(owner):
        mine = owner == number
        texts = shards[number].rows()["captions"].take(repeated[mine] - starts[number]).to_pylist()
        for target, shard, captions in zip(first[mine], home[mine], texts, strict=True):
            gained.setdefault(int(shard), {}).setdefault(int(target - starts[shard]), []).extend(captions)
    for number, shard in enumerate(shards):
        keep = np.ones(len(shard.sample_id), bool)
        keep[repeated[slice(*np.searchsorted(repeated, starts[number:number + 2]))] - starts[number]] = False
        yield _with_captions(shard.rows(), gained.get(number, {})).filter(pa.array(keep))


def _with_captions(table: pa.Table, gained: dict[int, list[str]]) -> pa.Table:
    if not gained:
        return table
    captions = table["captions"].to_pylist()
    for row, texts in gained.items():
        captions[row] = list(dict.fromkeys([*captions[row], *texts]))
    column = pa.array(captions, ROWS.field("captions").type)
    return table.set_column(table.schema.get_field_index("captions"), ROWS.field("captions"), column)


def _coded(tables: Iterable[pa.Table], sources: list[str], groups: Carried, kept: list[int]) -> Iterator[pa.Table]:
    """The index's columns with names still as codes. Appends to `kept` how many rows each shard has left."""
    for number, table in enumerate(tables):
        kept.append(table.num_rows)
        made = {"shard": pa.array(np.full(table.num_rows, number, np.int32)),
                "source": pc.index_in(  # pyright: ignore[reportAttributeAccessIssue]
                    table["source"], value_set=pa.array(sources, pa.string())).fill_null(0).cast(pa.int16()),
                "group": pa.array(groups.of(table["sample_id"].to_numpy()))}
        yield pa.table({name: made.get(name, table[name] if name in ROWS.names else None) for name in INDEX.names})


def _batches(tables: Iterable[pa.Table], names: list[str], sources: list[str]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of INDEX_BATCH_ROWS, only the last one shorter; codes become dictionary columns."""
    dictionaries = {"shard": pa.array(names, pa.string()), "source": pa.array(sources, pa.string())}

    def batch(table: pa.Table) -> pa.RecordBatch:
        columns = {name: table[name].combine_chunks() for name in INDEX.names}
        for name, dictionary in dictionaries.items():
            columns[name] = pa.DictionaryArray.from_arrays(columns[name], dictionary)
        return pa.record_batch(list(columns.values()), schema=INDEX)

    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(t.num_rows for t in waiting) >= INDEX_BATCH_ROWS:
            joined = pa.concat_tables(waiting)
            yield batch(joined.slice(0, INDEX_BATCH_ROWS))
            waiting = [joined.slice(INDEX_BATCH_ROWS)]
    if any(t.num_rows for t in waiting):
        yield batch(pa.concat_tables(waiting))


def _streams(batch: pa.RecordBatch) -> Iterator[tuple[str, Any]]:
    """Every column but those of NOT_THE_SAMPLES as named streams of bytes that do not depend on where batches are cut."""
    for name in INDEX.names:
        column = batch.column(name)
        if isinstance(column, pa.DictionaryArray):
            column = column.indices
        if isinstance(column, pa.ListArray):
            yield f"{name} counts", column.value_lengths().to_numpy()
            column = column.flatten()
        if pa.types.is_string(column.type):
            yield f"{name} lengths", pc.binary_length(column).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
            yield name, "".join(column.to_pylist()).encode()
        elif name not in NOT_THE_SAMPLES:
            yield name, np.ascontiguousarray(column.to_numpy(zero_copy_only=False))


def _write(path: Path, batches: Iterator[pa.RecordBatch], names: list[str], sources: list[str]) -> str:
    """Write index.arrow; return its fingerprint: a sha256 over the names and over each column's own sha256.

    The old index stays whole until then; its manifest steps aside with it.
    """
    hashers: defaultdict[str, Any] = defaultdict(hashlib.sha256)

    def hashed() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for name, data in _streams(batch):
                hashers[name].update(data)
            yield batch

    with replacing(path) as temporary:
        arrows.write(temporary, INDEX, hashed())
        with suppress(FileNotFoundError):
            path.with_name(MANIFEST_NAME).replace(path.with_name(PREVIOUS_NAME))
    told = [SCHEMA_VERSION, names, sources, {name: hasher.hexdigest() for name, hasher in hashers.items()}]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _quarantine(path: Path, shards: list[Scanned]) -> Counter[str]:
    """Write one line for each unusable sample; return how many there are for each reason, in all its words."""
    counts: Counter[str] = Counter()
    with replacing(path) as temporary, temporary.open("wb") as file:
        for shard in shards:
            for key, reason in shard.unusable:
                counts[reason] += 1
                file.write(sealed_json({"shard": shard.name, "key": key, "reason": reason}) + b"\n")
    return counts


def build(folder: Path, workers: int | None = None, command: str = "") -> dict:
    """Index every tar under `folder`; returns the manifest, which is written last. Only new and changed tars are read.

    Takedowns wait until it has ended. Raises InputError where there is no tar, WorkFailed where there is no usable sample.
    """
    with alone(homes(existing(folder, "the folder"))):
        return build_locked(folder, workers, command)


def build_locked(folder: Path, workers: int | None = None, command: str = "") -> dict:
    """The same for who is `alone` there."""
    names = _tars(folder)
    shards = scanned(folder, names, workers, Forgotten.beside(folder, names))
    reasons = _quarantine(folder / QUARANTINE_NAME, shards)
    if gone := sum(int(shard.gone.sum()) for shard in shards):
        reasons[FORGOTTEN] = gone
    if not sum(len(shard.sample_id) for shard in shards):
        remove(folder)
        most = ", ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common(3))
        raise WorkFailed(f"{folder}: no usable sample in {len(names):,} tars; {most}, see {folder / QUARANTINE_NAME}")
    excluded: Counter[str] = Counter()
    for reason, count in reasons.items():
        excluded[reason.partition(":")[0]] += count
    return assemble(folder, shards, dict(excluded.most_common()), command)


def remove(folder: Path) -> None:
    """Take the index away; the tars stay."""
    for name in (MANIFEST_NAME, PREVIOUS_NAME, INDEX_NAME):
        (folder / name).unlink(missing_ok=True)


def _groups_before(folder: Path) -> Grouped | None:
    """Of the index that was here. What cannot be kept of a damaged one is said."""
    manifest, damage = manifest_of(folder), MANIFEST_NAME
    try:
        if manifest or not (folder / MANIFEST_NAME).exists():
            damage = INDEX_NAME
            return Grouped.read(folder / INDEX_NAME, manifest)
    except UNREADABLE:
        pass
    err.print(f"warning: {folder / damage} was damaged: the index is made anew, without its duplicate groups: if it had any, "
              f"run `uniclip-data duplicates {folder}` again", style="yellow", highlight=False)
    return None


def assemble(folder: Path, shards: Sequence[Shard], excluded: dict[str, int], command: str,
             more: dict | None = None, inputs: Sequence[Grouped] = ()) -> dict:
    """Write index.arrow from the shards' rows, then the manifest, which also has `more`; returns the manifest.

    Groups of the index that was here, and of `inputs`, stay.
    """
    names = [shard.name for shard in shards]
    sources, kept = sorted(set().union(*(shard.sources for shard in shards))), []
    if len(sources) > _MAX_SOURCES:
        sources = [""]
    before = _groups_before(folder)
    groups = carried([*([before] if before else []), *inputs], np.concatenate([shard.sample_id for shard in shards]))
    batches = _batches(_coded(_united(shards), sources, groups, kept), names, sources)
    fingerprint = _write(folder / INDEX_NAME, batches, names, sources)
    total = sum(len(shard.sample_id) for shard in shards)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "counts": {"samples": sum(kept), "merged": total - sum(kept), "excluded": excluded},
        "sources": sources, "fingerprint": fingerprint, **({"duplicates": groups.told} if groups.told else {}),
        "created_by": {"command": command,
                       "versions": {name: version(name) for name in ("pillow", "pyarrow", "numpy")}},
        "shards": [{"name": shard.name, "size": shard.size, "sha256": shard.sha256, "samples": samples}
                   for shard, samples in zip(shards, kept, strict=True)],
        **(more or {})}
    write_sealed_json(folder / MANIFEST_NAME, manifest)
    (folder / PREVIOUS_NAME).unlink(missing_ok=True)
    return manifest
