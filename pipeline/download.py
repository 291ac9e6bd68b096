"""img2dataset, run to completion: our fetch policy in its workers, resume by whole shards, every URL accounted for."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.console import InputError, WorkFailed, existing
from pipeline.fetch import USER_AGENT, Policy, networks
from pipeline.files import sha256_of, write_json
from pipeline.processes import in_processes
from pipeline.progress import Meter
from pipeline.schema import URLS
from pipeline.survival import Report, account, shard_files, so_far

# What img2dataset copies into each sample's .json, beside sizes and the original's sha256; `caption` is its .txt.
COLUMNS = ("sample_id", "captions", "source", "caption", "url")
_REPORT, _SETTINGS, _SCRATCH = "download.json", "settings.json", "_tmp"


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

    def binding(self) -> dict:
        """The options that decide what is stored; the others only decide how fast, and may change on resume."""
        return {"image_size": self.image_size, "shard_size": self.shard_size,
                "allow_address": sorted(self.allow_address), "user_agent": self.user_agent}

    def policy(self) -> Policy:
        return Policy(timeout=self.timeout, deadline=4 * self.timeout, allow=self.allow_address,
                      user_agent=self.user_agent)


def _table(urls: Path) -> pq.ParquetFile:
    existing(urls, "the URL table", "write one with `uniclip-data urls table`")
    try:
        table = pq.ParquetFile(urls)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{urls} is no Parquet file ({error}): write it with `uniclip-data urls table`") from None
    schema = table.schema_arrow
    if not schema.equals(URLS) or (schema.metadata or {}).get(b"uniclip.schema") != URLS.metadata[b"uniclip.schema"]:
        raise InputError(f"{urls} is not a URL table of this version: write it with `uniclip-data urls table`")
    if table.metadata.num_rows == 0:
        raise InputError(f"{urls} has no rows")
    return table


def _tasks(table: pq.ParquetFile, size: int, done: set[int], scratch: Path) -> Iterator[tuple[int, str]]:
    """(shard number, Arrow file with its rows), written as they are asked for."""
    for shard, rows in enumerate(_slices(table, size)):
        if shard in done:
            continue
        first = pa.array([captions[0] if captions else "" for captions in rows["captions"].to_pylist()], pa.string())
        rows = rows.append_column("caption", first).select(list(COLUMNS))
        path = scratch / f"{shard}.arrow"
        with pa.ipc.new_file(path, rows.schema) as writer:
            writer.write_table(rows)
        yield shard, str(path)


def _slices(table: pq.ParquetFile, size: int) -> Iterator[pa.Table]:
    """The table in pieces of `size` rows, holding one row group at a time."""
    rest = table.schema_arrow.empty_table()
    for batch in table.iter_batches(batch_size=max(size, 65_536)):
        rest = pa.concat_tables([rest, pa.Table.from_batches([batch])])
        while rest.num_rows >= size:
            yield rest.slice(0, size)
            rest = rest.slice(size)
    if rest.num_rows:
        yield rest


def _bind(out: Path, settings: dict) -> None:
    """Keep the settings beside the shards; on resume refuse others. Raises InputError with the field named."""
    path = out / _SETTINGS
    if not path.exists():
        if tar := next(out.glob("*.tar"), None):
            raise InputError(f"{tar} was not downloaded by this command: choose another folder")
        write_json(path, settings)
        return
    before = json.loads(path.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(f"{out} was begun with {name} = {before.get(name)!r}, now it is {value!r}: "
                             "use the same, or another folder")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another download is running in {out}: wait for it or choose another folder") from None
        yield


def _finished(out: Path, shards: int) -> set[int]:
    """Numbers of the shards that are whole. What a killed run left of others is removed."""
    shutil.rmtree(out / _SCRATCH, ignore_errors=True)
    whole = set()
    for shard in range(shards):
        paths = shard_files(out, shard)
        if all(path.exists() for path in paths):
            whole.add(shard)
            continue
        for path in paths:
            path.unlink(missing_ok=True)
    return whole


def _in_worker(options: Options, scratch: Path, final: Path, task: tuple[int, str]) -> int:
    from pipeline.workers import download_shard  # brings img2dataset, which the parent can do without

    return download_shard(options, scratch, final, task)


def _run(table: pq.ParquetFile, out: Path, options: Options, done: set[int]) -> None:
    """Download the shards that are not done."""
    scratch = out / _SCRATCH / str(os.getpid())  # its own name, so that a dying worker of an earlier run cannot meddle
    scratch.mkdir(parents=True)
    work = partial(_in_worker, options, scratch.absolute(), out.absolute())
    tried, stored = so_far(out, done)
    tasks = _tasks(table, options.shard_size, done, scratch)
    with Meter("downloading", table.metadata.num_rows, tried) as meter:
        for shard in in_processes(work, tasks, options.processes):
            count, success = so_far(out, {shard})
            tried, stored = tried + count, stored + success
            meter.at(tried, f"{100 * stored / tried:.1f}% stored")
    shutil.rmtree(out / _SCRATCH)


def download(urls: Path, out: Path, options: Options, command: str = "") -> Report:
    """Fetch every URL of the table into WebDataset shards in `out`, or go on where an earlier run was stopped.

    Raises InputError for a wrong table, option or folder, WorkFailed when nothing at all could be fetched.
    """
    table = _table(urls)
    try:
        networks(options.allow_address)
    except ValueError as error:
        raise InputError(f"--allow-address: {error}") from None
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder for the shards")
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _bind(out, {"urls_sha256": sha256_of(urls), **options.binding()})
        try:
            return _complete(table, urls, out, options, command)
        except OSError as error:
            raise WorkFailed(f"{out}: {error}: run the same command again to go on") from error


def _complete(table: pq.ParquetFile, urls: Path, out: Path, options: Options, command: str) -> Report:
    """Download what is missing, add up, and write the report last."""
    began, rows = time.monotonic(), table.metadata.num_rows
    shards = -(-rows // options.shard_size)
    done = _finished(out, shards)
    if len(done) < shards:
        (out / _REPORT).unlink(missing_ok=True)
        _run(table, out, options, done)
    report = account(out, rows, options.shard_size)
    if report.stored == 0:
        _forget(out, shards)
        raise WorkFailed(_why_nothing(report))
    if not (out / _REPORT).exists():
        versions = {name: version(name) for name in ("img2dataset", "pillow", "opencv-python-headless", "pyarrow")}
        write_json(out / _REPORT, {
            **asdict(report), "seconds": round(time.monotonic() - began, 1), "rows_of_earlier_runs": so_far(out, done)[0],
            "settings": asdict(options), "urls": str(urls), "versions": versions, "command": command})
    return report


def _forget(out: Path, shards: int) -> None:
    """Remove shards and settings, so that the next run tries again and may be told otherwise."""
    for shard in range(shards):
        for path in shard_files(out, shard):
            path.unlink()
    (out / _SETTINGS).unlink()


def _why_nothing(report: Report) -> str:
    reason, count = next(iter(report.failed.items()))
    cure = ": if that address is meant, allow it with --allow-address" if reason == "refused address" else ""
    return (f"none of {report.rows:,} URLs could be fetched, {count:,} of them with \"{reason}\", "
            f"e.g. {report.example[reason]}{cure}")
