"""Takedown: samples named by URL, id or hash leave a download or an index for good.

They are listed in forgotten.parquet (schema.FORGOTTEN), which all commands obey; a rewrite also blanks their bytes in the
tars, and their keys and captions in the indexes. Bytes and rows keep their places, so that every index of those tars stays
right and a run goes on; the next `index` or `merge` leaves the rows out.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import arrows, parquet
from pipeline.console import InputError, existing
from pipeline.files import alone, homes, replacing, sha256_of
from pipeline.index import INDEX_NAME, MANIFEST_NAME, Index, manifest_of
from pipeline.indexing import build_locked, remove
from pipeline.merging import Input, merge_locked, places, scans_below
from pipeline.scans import Scanned
from pipeline.schema import INDEX, sample_id_of
from pipeline.seals import read_json, write_sealed_json
from pipeline.skips import FORGOTTEN_NAME, Forgotten, present
from pipeline.survival import FORGOTTEN, SUMS
from pipeline.tars import Known, blank, is_utf8

_SHA256 = re.compile(r"(?i)[0-9a-f]{64}")


@dataclass(frozen=True)
class Takedown:
    """What is asked to go: URLs, sample ids, sha256 of the original or of the stored image."""

    urls: frozenset[str] = frozenset()
    ids: frozenset[int] = frozenset()
    hashes: frozenset[str] = frozenset()

    def named(self, reason: str) -> Forgotten:
        """As the list has it. Sets indexed before fragments were cut have the id of the whole URL, so both are listed."""
        ids = {sample_id_of(form) for url in self.urls for form in (url, url.encode())}
        return Forgotten(dict.fromkeys([*self.ids, *ids], reason),
                         dict.fromkeys(self.hashes, reason))


@dataclass(frozen=True)
class Done:
    """How many were named, are no longer present in the index, and were blanked in tars.

    unknown: hashes that nothing here has; untold: folders that this index was merged from and whose lists cannot be written;
    emptied: folders whose index has gone with its last sample.
    """

    named: int
    indexed: int
    removed: int
    unknown: int
    untold: tuple[Path, ...]
    emptied: tuple[Path, ...]


def words_of(path: Path) -> list[str]:
    """The lines of a list. Raises InputError."""
    words = []
    if path.is_dir():
        raise InputError(f"--list {path} is a folder: give a file with one URL, id or sha256 a line")
    for number, line in enumerate(existing(path, "the list").read_bytes().splitlines(), 1):
        try:
            words.append(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise InputError(f"{path}, line {number}: {line!r} is not UTF-8: save the list as UTF-8") from None
    return words


def parse(words: Iterable[str]) -> Takedown:
    """Each word is a URL, a sample id, or a sha256. Raises InputError."""
    urls, ids, hashes = set(), set(), set()
    for word in filter(None, map(str.strip, words)):
        if _SHA256.fullmatch(word):
            hashes.add(word.lower())
        elif word.isascii() and word.isdigit() and int(word) < 2**63:
            ids.add(int(word))
        elif "://" in word and is_utf8(word):
            urls.add(word)
        else:
            raise InputError(f"{word!r} is neither a URL nor a sample id nor a sha256 (64 hexadecimal digits)")
    if not urls | ids | hashes:
        raise InputError("nothing is named: give URLs, sample ids or sha256 sums")
    return Takedown(frozenset(urls), frozenset(ids), frozenset(hashes))


def forget(folder: Path, what: Takedown, reason: str = "takedown", rewrite: bool = False) -> Done:
    """Add to forgotten.parquet in FOLDER and in the folders that its index was merged from. Their indexes keep the rows.

    Nothing need be here yet: it will never be fetched or indexed. What has a named hash goes with all its ids and hashes.
    Stopped anywhere, the same call goes on. Raises InputError before anything is changed.
    """
    within = places(existing(folder, "the folder"))
    untold = tuple(place for place in within if not os.access(place, os.W_OK))
    if untold and (rewrite or folder in untold):
        raise InputError(f"{untold[0]} is not here or cannot be written: run the same command where it can")
    here = [place for place in within if place not in untold]
    with alone({home for place in here for home in homes(place)}):
        return _forget(folder, here, untold, what, reason, rewrite)


def _forget(folder: Path, within: list[Path], untold: tuple[Path, ...], what: Takedown, reason: str, rewrite: bool) -> Done:
    told = {place: Forgotten.read(place / FORGOTTEN_NAME) for place in within}
    indexes = {place: Index.open(place) for place in told if (place / MANIFEST_NAME).exists()}
    before = {place: len(present(index)) for place, index in indexes.items()}
    reason = reason.encode(errors="replace").decode()
    named, tars, scans = what.named(reason), {}, {}
    if rewrite or what.hashes:
        named, tars, scans = _found(folder, named, told.values() if rewrite else ())
    known = {one for taken in tars.values() for one in taken}
    if rewrite:
        _check(tars)
        named |= Forgotten({one.sample_id: reason for one in known})  # of equal keys all lose their bytes
    for place, listed in told.items():
        (listed | named).write(place / FORGOTTEN_NAME)
    sums = _blank(tars, scans) if rewrite else {}
    left = {place: len(present(index)) for place, index in indexes.items()}
    for place, index in indexes.items():
        if not left[place]:
            remove(place)
        elif rewrite:
            _scrub(index, sums)
    for place in reversed(told):
        if place not in indexes and (previous := manifest_of(place)):
            _remake(place, previous)
    return Done(named=len(what.urls) + len(what.ids) + len(what.hashes),
                indexed=before[folder] - left[folder] if folder in left else 0,
                removed=len({(tar.resolve(), one.key) for tar in tars for one in tars[tar]}) if rewrite else 0,
                unknown=len(what.hashes - {one.sha256 for one in known} - {one.original for one in known}), untold=untold,
                emptied=tuple(place for place in indexes if not left[place]))


def _found(folder: Path, named: Forgotten, earlier: Iterable[Forgotten]
           ) -> tuple[Forgotten, dict[Path, set[Known]], dict[Path, Scanned]]:
    """All ids and hashes of what has a hash that is named; tar → what is named in it, now or earlier; tar → its scan."""
    reason = next(iter({**named.ids, **named.hashes}.values()))
    while True:
        tars: defaultdict[Path, set[Known]] = defaultdict(set)
        scans = dict(scans_below(folder, reduce(Forgotten.__or__, earlier, named)))
        for tar, scan in scans.items():
            if taken := scan.taken():
                tars[tar].update(taken)
        alike = [one for taken in tars.values() for one in taken if {one.sha256, one.original} & named.hashes.keys()]
        sums = {one for known in alike for one in (known.sha256, known.original) if one}
        if sums <= named.hashes.keys() and {one.sample_id for one in alike} <= named.ids.keys():
            return named, dict(tars), scans
        named |= Forgotten({one.sample_id: reason for one in alike}, dict.fromkeys(sums, reason))


def _check(tars: Iterable[Path]) -> None:
    """Raises InputError for a tar that cannot be rewritten, or whose bytes would stay under another name."""
    for tar in tars:
        if not os.access(tar.resolve().parent, os.W_OK):
            raise InputError(f"{tar.resolve()} cannot be written: run the same command where it can")
        if (names := tar.stat().st_nlink) > 1:
            raise InputError(f"{tar} has {names} names (hard links), which would keep the bytes: give it a copy of its own "
                             "(cp, then mv over it), and forget in the others' folders as well")


def _blank(tars: dict[Path, set[Known]], scans: dict[Path, Scanned]) -> dict[Path, str]:
    """Put zeros into the tars; nothing of these samples stays in their scans. Every tar's new sha256."""
    sums = {tar.resolve(): scan.sha256 for tar, scan in scans.items()}
    for tar, taken in tars.items():
        keys = {one.key for one in taken}
        stats = _mark(tar, keys)
        blank(tar, keys)
        scans[tar].path.unlink(missing_ok=True)
        sums[tar.resolve()] = sha256_of(tar)
        if stats:
            files = [path for path in (tar, tar.with_suffix(".parquet")) if path.exists()]
            write_sealed_json(_stats_of(tar), {**stats, SUMS: {path.suffix: sha256_of(path) for path in files}})
    return sums


def _scrub(index: Index, sums: dict[Path, str]) -> None:
    """The same index with FORGOTTEN for key and captions of what is forgotten; its fingerprint stays. sums: tar → sha256."""
    gone = pa.array(np.delete(index.columns(np.arange(len(index)))["sample_id"], present(index)))
    if len(gone):
        with replacing(index.folder / INDEX_NAME) as temporary:
            batches = (_scrubbed(index.batch(number), gone) for number in range(index.file.batches))
            arrows.write(temporary, index.file.schema, batches)
    shards = [{**shard, "sha256": sums.get((index.folder / shard["name"]).resolve(), shard["sha256"])}
              for shard in index.manifest["shards"]]
    write_sealed_json(index.folder / MANIFEST_NAME, {**index.manifest, "shards": shards})


def _scrubbed(batch: pa.RecordBatch, gone: pa.Array) -> pa.RecordBatch:
    hit = pc.is_in(batch.column("sample_id"), value_set=gone)  # pyright: ignore[reportAttributeAccessIssue]
    texts = batch.column("captions")
    hits = pc.take(hit, pc.list_parent_indices(texts))  # pyright: ignore[reportAttributeAccessIssue]
    for name, told in {"key": pc.if_else(hit, FORGOTTEN, batch.column("key")),  # pyright: ignore[reportAttributeAccessIssue]
                       "captions": pa.ListArray.from_arrays(
                           texts.offsets, pc.if_else(hits, FORGOTTEN, texts.values))}.items():  # pyright: ignore
        batch = batch.set_column(INDEX.get_field_index(name), INDEX.field(name), told)
    return batch


def _remake(place: Path, previous: dict) -> None:
    """An index whose making was killed at its end, by who is `alone` there."""
    command = previous.get("created_by", {}).get("command", "")
    if "merged_from" in previous:
        merge_locked(place, [Input(place / one["folder"], one["weight"]) for one in previous["merged_from"]], command)
    else:
        build_locked(place, command=command)


def _mark(tar: Path, keys: set[str]) -> dict:
    """In a download's tables what was stored is now a failure of the class `forgotten`, and its hash is gone with it.

    Returns the stats, as they will be when the tar is rewritten, too; until then they name no checksums.
    """
    table, stats = tar.with_suffix(".parquet"), _stats_of(tar)
    told = read_json(stats, "run the download again, then forget again") if stats.exists() else {}
    if told.pop(SUMS, None):
        write_sealed_json(stats, told)
    rows = parquet.opened(table, "delete this shard's files, run the download again, then forget again").read() \
        if table.exists() else pa.table({})
    if not {"key", "status", "error_message"} <= set(rows.column_names):
        return told
    success = np.array(rows["status"].to_pylist()) == "success"
    hit = success & np.isin(np.array(rows["key"].to_pylist(), object), list(keys))
    for name, value in {"status": "failed_to_download", "error_message": FORGOTTEN, "sha256": None}.items():
        if name in rows.column_names:
            column = pc.if_else(  # pyright: ignore[reportAttributeAccessIssue]
                pa.array(hit), pa.scalar(value, pa.string()), rows[name].cast(pa.string()))
            rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    parquet.write(table, rows)
    stored = int((success & ~hit).sum())
    lost = told["successes"] - stored if told else 0
    return told and {**told, "successes": stored, "failed_to_download": told.get("failed_to_download", 0) + lost}


def _stats_of(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}_stats.json")
