"""Takedown: samples named by URL, id or hash leave a download or an index for good.

They are listed in forgotten.parquet (schema.SKIPS), which download, retry, index and merge obey; a rewrite also removes
their bytes from the tars.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.console import InputError, existing
from pipeline.files import replacing, write_json
from pipeline.index import MANIFEST_NAME, Index
from pipeline.indexing import build
from pipeline.progress import Meter
from pipeline.retry import rounds
from pipeline.schema import sample_id_of
from pipeline.skips import FORGOTTEN_NAME, forgotten, write_skips
from pipeline.stores import Store
from pipeline.survival import FORGOTTEN, shard_files, shards_of

_SHA256 = re.compile(r"(?i)[0-9a-f]{64}")


@dataclass(frozen=True)
class Takedown:
    """What is asked to go: URLs, sample ids, sha256 of the original or of the stored image."""

    urls: frozenset[str] = frozenset()
    ids: frozenset[int] = frozenset()
    hashes: frozenset[str] = frozenset()


def parse(words: Iterable[str]) -> Takedown:
    """Each word is a URL, a sample id, or a sha256. Raises InputError."""
    urls, ids, hashes = set(), set(), set()
    for word in filter(None, map(str.strip, words)):
        if _SHA256.fullmatch(word):
            hashes.add(word.lower())
        elif word.isascii() and word.isdigit() and int(word) < 2**63:
            ids.add(int(word))
        elif "://" in word:
            urls.add(word)
        else:
            raise InputError(f"{word!r} is neither a URL nor a sample id nor a sha256 (64 hexadecimal digits)")
    if not urls | ids | hashes:
        raise InputError("nothing is named: give URLs, sample ids or sha256 sums")
    return Takedown(frozenset(urls), frozenset(ids), frozenset(hashes))


def forget(folder: Path, what: Takedown, reason: str = "takedown", rewrite: bool = False,
           command: str = "") -> dict[str, int]:
    """Add to FOLDER/forgotten.parquet; returns how many were named, are stored here, and were removed from tars.

    URLs and ids need not be here yet: they will never be fetched or indexed. A hash that is not here is an InputError,
    for it cannot be known again. An index that is here is made again.
    """
    existing(folder, "the folder")
    ids = dict.fromkeys([*what.ids, *map(sample_id_of, what.urls)], reason)
    index = Index.open(folder) if (folder / MANIFEST_NAME).exists() else None
    if what.hashes:
        found = _with_hashes(folder, index, what.hashes)
        if missing := sorted(what.hashes - found.keys()):
            raise InputError(f"{folder}: no image here has the sha256 {missing[0]}" +
                             (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "") + ": name its URL instead")
        ids |= {one: reason for known in found.values() for one in known}
    stored = int(np.isin(index.columns(np.arange(len(index)))["sample_id"], list(ids)).sum()) if index else 0
    write_skips(folder / FORGOTTEN_NAME, {**ids, **forgotten(folder)})
    removed = sum(_rewrite(place, set(forgotten(folder))) for place in rounds(folder)) if rewrite else 0
    if index is not None:
        _index_again(folder, index, command)
    return {"named": len(ids), "indexed": stored, "removed": removed}


def _index_again(folder: Path, index: Index, command: str) -> None:
    if merged := index.manifest.get("merged_from"):
        from pipeline.merging import Input, merge

        merge(folder, [Input(folder / one["folder"], one["weight"]) for one in merged], command)
    else:
        build(folder, command=command)


def _with_hashes(folder: Path, index: Index | None, hashes: frozenset[str]) -> dict[str, set[int]]:
    """sha256 → sample ids, by the originals' sums that the download kept and by the stored images."""
    found: dict[str, set[int]] = {}
    for place in rounds(folder):
        for shard in shards_of(place):
            table = pq.read_table(place / shard_files(shard)[1], columns=["sample_id", "sha256"])
            table = table.filter(pc.is_in(  # pyright: ignore[reportAttributeAccessIssue]
                table["sha256"], value_set=pa.array(sorted(hashes), pa.string())))
            for one, sha256 in zip(table["sample_id"].to_pylist(), table["sha256"].to_pylist(), strict=True):
                found.setdefault(sha256, set()).add(one)
    if index is None or hashes <= found.keys():
        return found
    with Meter("looking for hashes", len(index)) as meter:
        for shard, name in enumerate(index.shards):
            rows = index.columns(np.arange(*index.shard_starts[shard:shard + 2]))
            with (index.folder / name).open("rb") as file:
                for one, offset, size in zip(rows["sample_id"], rows["offset"], rows["size"], strict=True):
                    file.seek(offset)
                    if (sha256 := hashlib.sha256(file.read(size)).hexdigest()) in hashes:
                        found.setdefault(sha256, set()).add(int(one))
            meter.at(int(index.shard_starts[shard + 1]))
    return found


def _rewrite(place: Path, gone: set[int]) -> int:
    """Take the samples out of a download's tars and tables; how many."""
    removed = 0
    for shard in shards_of(place):
        tar, table, stats = (place / name for name in shard_files(shard))
        rows = pq.read_table(table)
        hit = np.isin(rows["sample_id"].to_numpy(), list(gone)) & (np.array(rows["status"].to_pylist()) == "success")
        if not hit.any():
            continue
        keys = set(rows["key"].filter(pa.array(hit)).to_pylist())
        _rewrite_tar(tar, keys)
        _mark(rows, hit, table)
        told = Store(place).read_json(stats.name)
        told["successes"] -= len(keys)
        told["failed_to_download"] = told.get("failed_to_download", 0) + len(keys)
        write_json(stats, told)
        removed += len(keys)
    return removed


def _rewrite_tar(path: Path, keys: set[str]) -> None:
    with replacing(path) as temporary, tarfile.open(path) as old, tarfile.open(temporary, "w") as new:
        for member in old:
            if member.name.partition(".")[0] not in keys:
                new.addfile(member, old.extractfile(member))


def _mark(rows: pa.Table, hit: np.ndarray, path: Path) -> None:
    """What was stored is now a failure of the class `forgotten`, and its hash is gone with it."""
    blank = {"status": "failed_to_download", "error_message": FORGOTTEN, "sha256": None}
    for name, value in blank.items():
        column = pc.if_else(  # pyright: ignore[reportAttributeAccessIssue]
            pa.array(hit), pa.scalar(value, pa.string()), rows[name].cast(pa.string()))
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    with replacing(path) as temporary:
        pq.write_table(rows, temporary)
