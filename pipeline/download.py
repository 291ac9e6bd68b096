"""img2dataset, run to completion: our fetch policy in its workers, resume by whole shards, every URL accounted for."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import parquet
from pipeline.console import InputError, WorkFailed, existing, what_failed
from pipeline.distributors import DISTRIBUTORS, distributor
from pipeline.fetch import USER_AGENT, Policy, networks
from pipeline.files import sha256_of
from pipeline.processes import allow_files
from pipeline.progress import Meter
from pipeline.schema import URLS
from pipeline.seals import UNREADABLE
from pipeline.skips import Forgotten, forgotten_in
from pipeline.stores import Store
from pipeline.survival import Report, account, shard_files, so_far

# What img2dataset copies into each sample's .json, beside sizes and the original's sha256; `caption` is its .txt.
COLUMNS = ("sample_id", "captions", "source", "source_row", "caption", "url")
FORMATS = ("jpg", "webp")
REPORT, SETTINGS = "download.json", "settings.json"
_SCRATCH = "_tmp"


@dataclass(frozen=True)
class Options:
    """What a download may be told. image_size: pixels of the shorter side at most; timeout: seconds without a byte."""

    image_size: int = 256
    shard_size: int = 1000
    processes: int | None = None  # one for each core
    threads: int = 32
    timeout: float = 10.0
    retries: int = 1
    allow_address: tuple[str, ...] = ()
    user_agent: str = USER_AGENT
    format: str = "jpg"
    robots: bool = False
    distributor: str = "processes"

    def binding(self) -> dict:
        """The options that decide what is stored; the others only decide how fast, and may change on resume."""
        return {"image_size": self.image_size, "shard_size": self.shard_size,
                "allow_address": sorted(self.allow_address), "user_agent": self.user_agent,
                "format": self.format, "robots": self.robots}

    def policy(self) -> Policy:
        return Policy(timeout=self.timeout, deadline=4 * self.timeout, allow=self.allow_address,
                      user_agent=self.user_agent)


@dataclass(frozen=True)
class Task:
    """One shard's rows as an Arrow file, those of its URLs that must not be asked for, and sha256 sums not to be stored."""

    shard: int
    rows: bytes
    forgotten: frozenset[str]
    hashes: frozenset[str]


def _table(urls: Path) -> pq.ParquetFile:
    existing(urls, "the URL table", "write one with `uniclip-data urls table`")
    table = parquet.opened(urls, "write it with `uniclip-data urls table`")
    schema = table.schema_arrow
    if not schema.equals(URLS) or (schema.metadata or {}).get(b"uniclip.schema") != URLS.metadata[b"uniclip.schema"]:
        raise InputError(f"{urls} is not a URL table of this version: write it with `uniclip-data urls table`")
    if table.metadata.num_rows == 0:
        raise InputError(f"{urls} has no rows")
    return table


def _tasks(table: pq.ParquetFile, size: int, done: set[int], forgotten: Forgotten) -> Iterator[Task]:
    """The shards that are not done, made as they are asked for."""
    for shard, rows in enumerate(_slices(table, size)):
        if shard in done:
            continue
        gone = rows.filter(pa.array(np.isin(rows["sample_id"].to_numpy(), forgotten.id_array)))
        first = pa.array([captions[0] if captions else "" for captions in rows["captions"].to_pylist()], pa.string())
        rows = rows.append_column("caption", first).select(list(COLUMNS))
        with pa.BufferOutputStream() as sink:
            with pa.ipc.new_file(sink, rows.schema) as writer:
                writer.write_table(rows)
            yield Task(shard, sink.getvalue().to_pybytes(), frozenset(gone["url"].to_pylist()), frozenset(forgotten.hashes))


def _slices(table: pq.ParquetFile, size: int) -> Iterator[pa.Table]:
    """The table in pieces of `size` rows, holding one row group at a time."""
    rest = table.schema_arrow.empty_table()
    try:
        for batch in table.iter_batches(batch_size=max(size, 65_536)):
            rest = pa.concat_tables([rest, pa.Table.from_batches([batch])])
            while rest.num_rows >= size:
                yield rest.slice(0, size)
                rest = rest.slice(size)
    except UNREADABLE as error:
        raise InputError(f"the URL table is damaged ({error}): write it again with `uniclip-data urls`") from None
    if rest.num_rows:
        yield rest


def _bind(out: Store, settings: dict, table: dict) -> None:
    """Keep the settings beside the shards; on resume refuse others. Raises InputError with the field named.

    table: name and rows, for the message when urls_sha256 is another.
    """
    names = out.names()
    if SETTINGS not in names:
        if tar := next((name for name in sorted(names) if name.endswith(".tar")), None):
            raise InputError(f"{out}/{tar} was not downloaded by this command: choose another folder")
        out.write_json(SETTINGS, {**settings, "table": table})
        return
    before = {**Options().binding(), **out.read_json(SETTINGS)}
    if before.get("urls_sha256") != settings["urls_sha256"]:
        old, new = (f"{one['name']} of {one['rows']:,} rows" if one else "another table"
                    for one in (before.get("table"), table))
        raise InputError(f"{out} was begun with {old}, now it is {new}{' with another content' if old == new else ''}: "
                         "use the same table, or another folder")
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(f"{out} was begun with {name} = {before.get(name)!r}, now it is {value!r}: "
                             "use the same, or another folder")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another download is running in {out}: wait for it or choose another folder") from None
        yield


def _finished(out: Store, shards: int) -> set[int]:
    """Numbers of the shards that are whole. What a killed run left of others is removed."""
    if out.local:
        shutil.rmtree(out.local / _SCRATCH, ignore_errors=True)
    whole, names = set(), out.names()
    for shard in range(shards):
        files = shard_files(shard)
        if names.issuperset(files):
            whole.add(shard)
            continue
        for name in names.intersection(files):
            out.remove(name)
    return whole


def _in_worker(options: Options, out: str, scratch: str | None, task: Task) -> int:
    from pipeline.workers import download_shard  # brings img2dataset, which the parent can do without

    return download_shard(options, Store(out), scratch, task)


def _run(table: pq.ParquetFile, out: Store, options: Options, done: set[int]) -> None:
    """Download the shards that are not done."""
    scratch, place = None, out.url
    if out.local:  # its own name, so that a dying worker of an earlier run cannot meddle
        (out.local / _SCRATCH / str(os.getpid())).mkdir(parents=True)
        scratch, place = str((out.local / _SCRATCH / str(os.getpid())).absolute()), str(out.local.absolute())
    work = partial(_in_worker, options, place, scratch)
    tried, stored = so_far(out, done)
    tasks = _tasks(table, options.shard_size, done, forgotten_in(out))
    with Meter("downloading", table.metadata.num_rows, tried) as meter:
        for shard in DISTRIBUTORS[options.distributor](work, tasks, options.processes):
            count, success = so_far(out, [shard])
            tried, stored = tried + count, stored + success
            meter.at(tried, f"{100 * stored / tried:.1f}% stored")
    if out.local:
        shutil.rmtree(out.local / _SCRATCH)


def _check(options: Options, out: Path | str) -> None:
    distributor(options.distributor)
    allow_files(options.threads)
    if options.format not in FORMATS:
        raise InputError(f"--format {options.format!r} is none of {', '.join(FORMATS)}")
    if not (options.user_agent.isascii() and options.user_agent.isprintable()):
        raise InputError(f"--user-agent {options.user_agent!r} must be one line of ASCII letters and signs")
    try:
        networks(options.allow_address)
    except ValueError as error:
        raise InputError(f"--allow-address: {error}: give an address or a block such as 10.0.0.0/8") from None
    if str(out).startswith("memory://") and options.distributor != "inline":
        raise InputError(f"{out} is seen by one process only: use --distributor inline, or another place")


def download(urls: Path, out: Path | str, options: Options, command: str = "", may_be_empty: bool = False) -> Report:
    """Fetch every URL of the table into WebDataset shards in `out`, or go on where an earlier run was stopped.

    out: a folder or an fsspec URL. Raises InputError for a wrong table, option or folder, WorkFailed when nothing at all
    could be fetched, unless that is expected.
    """
    table = _table(urls)
    _check(options, out)
    store = Store(out)
    if store.local:
        if store.local.exists() and not store.local.is_dir():
            raise InputError(f"{out} is a file: give a folder for the shards")
        store.local.mkdir(parents=True, exist_ok=True)
    with _locked(store.local) if store.local else nullcontext():  # object stores have no locks: run one download there
        try:
            _bind(store, {"urls_sha256": sha256_of(urls), **options.binding()},
                  {"name": urls.name, "rows": table.metadata.num_rows})
            return _complete(table, urls, store, options, command, may_be_empty)
        except OSError as error:
            raise WorkFailed(what_failed(error, str(out), "run the same command again to go on")) from error


def _complete(table: pq.ParquetFile, urls: Path, out: Store, options: Options, command: str, may_be_empty: bool) -> Report:
    """Download what is missing, add up, and write the report last."""
    began, rows = time.monotonic(), table.metadata.num_rows
    shards = -(-rows // options.shard_size)
    done = _finished(out, shards)
    if len(done) < shards:
        out.remove(REPORT)
        _run(table, out, options, done)
    report = account(out, rows, options.shard_size)
    if report.stored == 0 and not may_be_empty:
        _undo(out, shards)
        raise WorkFailed(_why_nothing(report))
    if not out.exists(REPORT):
        versions = {name: version(name) for name in ("img2dataset", "pillow", "opencv-python-headless", "pyarrow")}
        out.write_json(REPORT, {
            **asdict(report), "seconds": round(time.monotonic() - began, 1), "rows_of_earlier_runs": so_far(out, done)[0],
            "settings": asdict(options), "urls": str(urls), "versions": versions, "command": command})
    return report


def _undo(out: Store, shards: int) -> None:
    """Remove shards and settings, so that the next run tries again and may be told otherwise."""
    for shard in range(shards):
        for name in shard_files(shard):
            out.remove(name)
    out.remove(SETTINGS)


def _why_nothing(report: Report) -> str:
    reason, count = next(iter(report.failed.items()))
    cure = ": if that address is meant, allow it with --allow-address" if reason == "refused address" else ""
    return (f"none of {report.rows:,} URLs could be fetched, {count:,} of them with \"{reason}\", "
            f"e.g. {report.example[reason]}{cure}")
