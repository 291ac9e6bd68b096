"""What was found in each tar, kept beside the tars, so that only new and changed ones are read again."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import arrows
from pipeline.arrows import ArrowFile
from pipeline.console import InputError, err
from pipeline.files import replacing
from pipeline.processes import in_processes
from pipeline.progress import Meter
from pipeline.schema import SCHEMA_VERSION
from pipeline.seals import UNREADABLE, Damaged, read_json
from pipeline.skips import Forgotten
from pipeline.survival import SUMS
from pipeline.tars import ROWS, SCAN_VERSION, SCANNED, Known, scan

SCANS_NAME = ".scans"  # hidden, and of no use to anybody else: it may be deleted at any time
_NOTHING = Forgotten()


@dataclass(frozen=True)
class Scanned:
    """A shard whose rows wait in an Arrow file.

    gone: those that a takedown has taken out, no longer among them; lost: the unusable samples that it names.
    """

    name: str
    path: Path
    sample_id: np.ndarray
    gone: np.ndarray
    sources: frozenset[str]
    unusable: list[tuple[str, str]]
    lost: list[Known]
    size: int
    sha256: str

    def rows(self) -> pa.Table:
        """Schema ROWS."""
        scan = _read(self.path)
        digests = np.frombuffer(b"".join(scan["sha256"].to_pylist()), ">u8")[::4]  # of 32 bytes the first 8
        at = scan.schema.get_field_index("image_sum")
        table = scan.set_column(at, SCANNED.field(at), pa.array((digests >> 1).astype(np.int64))).select(ROWS.names)
        return table.filter(pa.array(~self.gone)) if self.gone.any() else table

    def taken(self) -> list[Known]:
        """What a takedown names here, usable or not."""
        if not self.gone.any():
            return self.lost
        hit = _read(self.path).select(["key", "sample_id", "sha256", "original"]).filter(pa.array(self.gone))
        return [*self.lost, *(Known(row["key"], row["sample_id"], row["sha256"].hex(), (row["original"] or b"").hex())
                              for row in hit.to_pylist())]


def _read(path: Path) -> pa.Table:
    """Raises Damaged, and what else is in seals.UNREADABLE."""
    file = ArrowFile(path)
    if not file.sealed:
        raise Damaged("it has no checksums")  # an older version wrote it
    return file.table()


def scan_path(folder: Path, name: str) -> Path:
    """Where the scan of a tar is kept."""
    return folder / SCANS_NAME / f"{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}.arrow"


def _stamp(path: Path) -> list[int]:
    """What changes with a tar's content: size, time of change, and how we scan."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, SCHEMA_VERSION, SCAN_VERSION]


def _scan_to_file(folder: Path, name: str) -> str:
    stamp, shard = _stamp(folder / name), scan(folder / name)
    told = {"stamp": stamp, "size": shard.size, "sha256": shard.sha256, "unusable": shard.unusable,
            "lost": [astuple(one) for one in shard.lost]}
    schema = SCANNED.with_metadata({"scan": json.dumps(told)})
    with replacing(scan_path(folder, name)) as temporary:
        arrows.write(temporary, schema, shard.rows.cast(schema).to_batches())
    return name


def _load(folder: Path, name: str, forgotten: Forgotten) -> Scanned | None:
    """The scan of a tar; None when there is none, or the tar has changed since."""
    path = scan_path(folder, name)
    try:
        table = _read(path)
        told = json.loads((table.schema.metadata or {})[b"scan"])
    except UNREADABLE:  # what is damaged is made again
        return None
    if told["stamp"] != _stamp(folder / name) or table.schema.names != SCANNED.names:
        return None
    ids = table["sample_id"].to_numpy()
    gone = forgotten.mask(table)
    lost = [one for one in (Known(*known) for known in told["lost"]) if forgotten.names(one)]
    if lost:  # two samples of one key cannot be told apart in the tar
        gone |= np.isin(np.array(table["key"].to_pylist(), object), [one.key for one in lost])
    return Scanned(name, path, ids[~gone], gone, frozenset(table["source"].unique().to_pylist()),
                   [(key, reason) for key, reason in told["unusable"]], lost, told["size"], told["sha256"])


def scanned(folder: Path, names: list[str], workers: int | None, forgotten: Forgotten = _NOTHING) -> list[Scanned]:
    """Every tar's scan, in the order of `names`. Interrupted, the next call goes on."""
    found = {name: shard for name in names if (shard := _load(folder, name, forgotten))}
    samples = sum(len(shard.sample_id) for shard in found.values())
    with Meter("indexing tars", len(names), len(found)) as meter:
        for name in _fresh(folder, [name for name in names if name not in found], workers):
            shard = _load(folder, name, forgotten)
            if shard is None:
                raise _lost(folder, name)
            found[name] = shard
            samples += len(shard.sample_id)
            meter.at(len(found), f"{samples:,} samples")
    _tidy(folder, names)
    _warn(folder, [found[name] for name in names])
    return [found[name] for name in names]


def _lost(folder: Path, name: str) -> InputError:
    """Why a scan that was just written cannot be used."""
    try:
        _read(path := scan_path(folder, name))
    except UNREADABLE as error:
        return InputError(f"{path} cannot be read as it was just written ({error}): look after the disk, then index again")
    return InputError(f"{folder / name} changes while it is read: wait until it is written, then index again")


def downloaded(tar: Path) -> str:
    """The sha256 that a tar had when it was downloaded; empty where nothing tells it."""
    stats = tar.with_name(f"{tar.stem}_stats.json")
    sums = read_json(stats, "delete this shard's files and run the download again").get(SUMS) if stats.is_file() else None
    return sums.get(".tar", "") if isinstance(sums, dict) else ""


def _warn(folder: Path, shards: list[Scanned]) -> None:
    """Say which tars have changed since they were downloaded."""
    changed = [shard.name for shard in shards if downloaded(folder / shard.name) not in ("", shard.sha256)]
    if changed:
        err.print(f"warning: {len(changed):,} tars are not as they were downloaded, the first is {folder / changed[0]}: "
                  f"`uniclip-data verify {folder}` names them and the cure", style="yellow", highlight=False)


def _fresh(folder: Path, names: list[str], workers: int | None) -> Iterator[str]:
    return in_processes(partial(_scan_to_file, folder), names, workers) if names else iter(())


def _tidy(folder: Path, names: list[str]) -> None:
    """Remove the scans of tars that are no longer there."""
    wanted = {scan_path(folder, name) for name in names}
    for path in (folder / SCANS_NAME).glob("*.arrow"):
        if path not in wanted:
            path.unlink()
