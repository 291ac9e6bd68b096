"""Takedown: samples named by URL, id or hash leave a download or an index for good.

They are listed in forgotten.parquet (schema.FORGOTTEN), which download, retry, index and merge obey; a rewrite also blanks
their bytes in the tars. Other bytes keep their places there, so that every index of those tars stays right.
"""

import fcntl
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.console import InputError, existing
from pipeline.files import replacing, write_json
from pipeline.index import MANIFEST_NAME, Index, manifest_of
from pipeline.indexing import assemble, build, remove
from pipeline.merging import Input, Part, merge, places, scans_below
from pipeline.schema import sample_id_of
from pipeline.skips import FORGOTTEN_NAME, Forgotten
from pipeline.survival import FORGOTTEN
from pipeline.tars import Known, blank, is_utf8

_SHA256 = re.compile(r"(?i)[0-9a-f]{64}")


@dataclass(frozen=True)
class Takedown:
    """What is asked to go: URLs, sample ids, sha256 of the original or of the stored image."""

    urls: frozenset[str] = frozenset()
    ids: frozenset[int] = frozenset()
    hashes: frozenset[str] = frozenset()

    def named(self, reason: str) -> Forgotten:
        """As the list has it."""
        return Forgotten(dict.fromkeys([*self.ids, *map(sample_id_of, self.urls)], reason),
                         dict.fromkeys(self.hashes, reason))


@dataclass(frozen=True)
class Done:
    """How many were named, left the index, and were blanked in tars.

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
    """Add to forgotten.parquet in FOLDER and in the folders that its index was merged from; take it out of their indexes.

    Nothing need be here yet: it will never be fetched or indexed. What has a named hash goes with all its ids and hashes.
    Stopped anywhere, the same call goes on. Raises InputError before anything is changed.
    """
    within = places(existing(folder, "the folder"))
    untold = tuple(place for place in within if not os.access(place, os.W_OK))
    if untold and (rewrite or folder in untold):
        raise InputError(f"{untold[0]} is not here or cannot be written: run the same command where it can")
    with _alone(place for place in within if place not in untold):
        return _forget(folder, [place for place in within if place not in untold], untold, what, reason, rewrite)


@contextmanager
def _alone(folders: Iterable[Path]) -> Iterator[None]:
    """Wait until no other takedown is at work in these folders."""
    with ExitStack() as stack:
        for folder in sorted({folder.resolve() for folder in folders}):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _forget(folder: Path, within: list[Path], untold: tuple[Path, ...], what: Takedown, reason: str, rewrite: bool) -> Done:
    told = {place: Forgotten.read(place / FORGOTTEN_NAME) for place in within}
    indexes = {place: Index.open(place) for place in told if (place / MANIFEST_NAME).exists()}
    named, tars = what.named(reason.encode(errors="replace").decode()), {}
    if rewrite or what.hashes:
        named, tars = _found(folder, named, told.values() if rewrite else ())
    if rewrite:
        _check(tars)
    for place, before in told.items():
        (before | named).write(place / FORGOTTEN_NAME)
    for tar in tars if rewrite else ():
        _mark(tar, {one.key for one in tars[tar]})
        blank(tar, {one.key for one in tars[tar]})
    known = {one for taken in tars.values() for one in taken}
    gone, touched = {one.sample_id for one in known}, set(tars) if rewrite else set()
    left = {place: _reduce(index, gone, touched) for place, index in indexes.items()}
    for place in reversed(told):
        if place not in indexes and (previous := manifest_of(place)):
            _remake(place, previous)
    return Done(named=len(what.urls) + len(what.ids) + len(what.hashes), indexed=left.get(folder, 0),
                removed=len({(tar.resolve(), one.key) for tar in touched for one in tars[tar]}),
                unknown=len(what.hashes - {one.sha256 for one in known} - {one.original for one in known}), untold=untold,
                emptied=tuple(place for place, index in indexes.items() if left[place] == len(index)))


def _found(folder: Path, named: Forgotten, earlier: Iterable[Forgotten]) -> tuple[Forgotten, dict[Path, set[Known]]]:
    """Tar → what is named in it, now or earlier; and all ids and hashes of what has a hash that is named."""
    reason = next(iter({**named.ids, **named.hashes}.values()))
    while True:
        tars: defaultdict[Path, set[Known]] = defaultdict(set)
        for tar, shard in scans_below(folder, reduce(Forgotten.__or__, earlier, named)):
            if taken := shard.taken():
                tars[tar].update(taken)
        alike = [one for taken in tars.values() for one in taken if {one.sha256, one.original} & named.hashes.keys()]
        sums = {one for known in alike for one in (known.sha256, known.original) if one}
        if sums <= named.hashes.keys() and {one.sample_id for one in alike} <= named.ids.keys():
            return named, dict(tars)
        named |= Forgotten({one.sample_id: reason for one in alike}, dict.fromkeys(sums, reason))


def _check(tars: Iterable[Path]) -> None:
    """Raises InputError for a tar that cannot be rewritten, or whose bytes would stay under another name."""
    for tar in tars:
        if not os.access(tar.resolve().parent, os.W_OK):
            raise InputError(f"{tar.resolve()} cannot be written: run the same command where it can")
        if (names := tar.stat().st_nlink) > 1:
            raise InputError(f"{tar} has {names} names (hard links), which would keep the bytes: give it a copy of its own "
                             "(cp, then mv over it), and forget in the others' folders as well")


def _reduce(index: Index, gone: set[int], touched: set[Path]) -> int:
    """The same index without these samples and those of all lists; how many they were. Without any left it is taken away."""
    gone = gone | Forgotten.beside(index.folder, index.shards).ids.keys()
    dropped, real = np.fromiter(gone, np.int64), {tar.resolve() for tar in touched}
    parts = [Part(index, number, name, dropped, (index.folder / name).resolve() in real)
             for number, name in enumerate(index.shards)]
    left = sum(part.gone for part in parts)
    if left == len(index):
        remove(index.folder)
    elif left or any(part.rewritten for part in parts):
        counts = index.manifest["counts"]
        excluded = dict(Counter(counts["excluded"]) + Counter({FORGOTTEN: left}))
        more = {name: index.manifest[name] for name in ("weights", "merged_from", "created_by") if name in index.manifest}
        assemble(index.folder, parts, excluded, "", {  # what made it stays: the card must not tell what was taken down
            **more, "counts": {"samples": len(index) - left, "merged": counts["merged"], "excluded": excluded}})
    return left


def _remake(place: Path, previous: dict) -> None:
    """An index whose making was killed at its end."""
    command = previous.get("created_by", {}).get("command", "")
    if "merged_from" in previous:
        merge(place, [Input(place / one["folder"], one["weight"]) for one in previous["merged_from"]], command)
    else:
        build(place, command=command)


def _mark(tar: Path, keys: set[str]) -> None:
    """In a download's tables what was stored is now a failure of the class `forgotten`, and its hash is gone with it."""
    path = tar.with_suffix(".parquet")
    rows = pq.read_table(path) if path.exists() else pa.table({})
    if not {"key", "status", "error_message"} <= set(rows.column_names):
        return
    success = np.array(rows["status"].to_pylist()) == "success"
    hit = success & np.isin(np.array(rows["key"].to_pylist(), object), list(keys))
    for name, value in {"status": "failed_to_download", "error_message": FORGOTTEN, "sha256": None}.items():
        if name in rows.column_names:
            column = pc.if_else(  # pyright: ignore[reportAttributeAccessIssue]
                pa.array(hit), pa.scalar(value, pa.string()), rows[name].cast(pa.string()))
            rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    with replacing(path) as temporary:
        pq.write_table(rows, temporary)
    _count(tar.with_name(f"{tar.stem}_stats.json"), int((success & ~hit).sum()))


def _count(path: Path, stored: int) -> None:
    """The stats beside a table that has `stored` images left."""
    if path.exists():
        told = json.loads(path.read_bytes())
        lost = told["successes"] - stored
        write_json(path, {**told, "successes": stored, "failed_to_download": told.get("failed_to_download", 0) + lost})
