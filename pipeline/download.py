"""img2dataset, run to completion: our fetch policy in its workers, resume by whole shards, every URL accounted for."""

import fcntl
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # albumentations phones home when img2dataset imports it

import img2dataset.downloader  # noqa: E402
from img2dataset.resizer import Resizer  # noqa: E402
from img2dataset.writer import WebDatasetSampleWriter  # noqa: E402

from pipeline.console import InputError, WorkFailed, existing  # noqa: E402
from pipeline.fetch import USER_AGENT, Failure, Policy, fetch, networks  # noqa: E402
from pipeline.files import sha256_of, write_json  # noqa: E402
from pipeline.images import Undecodable, inspect, plain_bytes  # noqa: E402
from pipeline.progress import Meter  # noqa: E402
from pipeline.schema import URLS  # noqa: E402
from pipeline.tars import why_undecodable  # noqa: E402
from pipeline.workers import in_processes  # noqa: E402

_COLUMNS = ("sample_id", "captions", "source", "caption", "url")  # what each sample's .json carries besides sizes
_DIGITS = 5  # of a shard's number
_QUALITY = 95
_REPORT, _SETTINGS, _SCRATCH = "download.json", "settings.json", "_tmp"
_SHARD_FILES = (".tar", ".parquet", "_stats.json")  # the last one marks the shard as finished


@dataclass(frozen=True)
class Options:
    """What a download may be told. image_size: pixels of the shorter side at most; timeout: seconds without a byte."""

    image_size: int = 256
    shard_size: int = 1000
    processes: int = field(default_factory=lambda: os.cpu_count() or 1)
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


@dataclass(frozen=True)
class Report:
    """rows = stored + sum(failed); `example` is one URL of each class of failure."""

    rows: int
    stored: int
    failed: dict[str, int]
    example: dict[str, str]

    def lines(self) -> list[str]:
        """The table for people: every outcome with its share of the rows."""
        outcomes = {"stored": self.stored, **self.failed}
        return [f"{count:>12,}  {100 * count / self.rows:5.1f}%  {what}" for what, count in outcomes.items()]


# --- inside the workers


def _shorter_side(data: bytes) -> int:
    """In pixels, from the header alone; 0 where there is none to read."""
    try:
        return min(Image.open(io.BytesIO(data)).size)
    except Exception:  # whatever is wrong with it, the full decode that follows names it
        return 0


class UprightResizer(Resizer):
    """img2dataset's resizer on upright RGB on white; a plain JPEG that needs no resizing is stored byte for byte."""

    def __call__(self, img_stream, blurring_bbox_list=None):
        data = img_stream.getvalue()
        try:
            if _shorter_side(data) <= self.image_size:
                facts = inspect(data)
                if facts.plain:
                    return data, facts.width, facts.height, facts.width, facts.height, None
            upright = io.BytesIO(plain_bytes(data))  # decoded once: OpenCV only copies a PPM
        except Undecodable as error:
            return None, None, None, None, None, f"{why_undecodable(error)}: {error}"
        *result, message = super().__call__(upright, blurring_bbox_list)
        return *result, message and f"broken image: {message}"


class PolicedDownloader(img2dataset.downloader.Downloader):
    """img2dataset's downloader with our fetch; a shard appears under its final name only when it is whole."""

    def __init__(self, policy: Policy, final: Path, **settings):
        super().__init__(**settings)
        self.policy, self.final = policy, final

    def _fetch(self, row, **_):
        key, url = row
        try:
            return key, io.BytesIO(fetch(url, self.policy, self.retries)), None
        except Failure as failure:
            return key, None, str(failure)
        except Exception as error:  # one odd URL must not cost its row
            return key, None, f"other: {type(error).__name__}: {error}"

    def download_shard(self, row) -> int:
        # super() looks this name up in its module; being unpickled in a worker brought us here.
        img2dataset.downloader.download_image_with_retry = self._fetch
        super().download_shard(row)
        name = _shard_name(row[0])
        for suffix in _SHARD_FILES:
            (Path(self.output_folder) / f"{name}{suffix}").replace(self.final / f"{name}{suffix}")
        return row[0]


# --- in the parent


def _shard_name(shard: int) -> str:
    return f"{shard:0{_DIGITS}d}"


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
        rows = rows.append_column("caption", first).select(list(_COLUMNS))
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
        write_json(path, settings)
        return
    before = json.loads(path.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(f"{out} was begun with {name} = {before.get(name)!r}, now it is {value!r}: "
                             "use the same value, or another folder")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another download is running in {out}: wait for it or choose another folder") from None
        yield


def _finished(out: Path) -> set[int]:
    """Numbers of the shards that are whole. What a killed run left of others is removed."""
    shutil.rmtree(out / _SCRATCH, ignore_errors=True)
    whole = {path.name.removesuffix("_stats.json") for path in out.glob("*_stats.json")}
    for path in [*out.glob("*.tar"), *out.glob("*.parquet")]:
        if path.stem.isdigit() and path.stem not in whole:
            path.unlink()
    return {int(name) for name in whole if name.isdigit()}


def _account(out: Path, rows: int, size: int) -> Report:
    """Add up every shard's rows by outcome. Raises WorkFailed where a shard does not account for all of its rows."""
    stored, failed, example = 0, Counter(), {}
    for shard in range(-(-rows // size)):
        outcome = pq.read_table(out / f"{_shard_name(shard)}.parquet", columns=["url", "status", "error_message"])
        expected = min(size, rows - shard * size)
        if outcome.num_rows != expected:
            raise WorkFailed(f"{out}/{_shard_name(shard)}.parquet accounts for {outcome.num_rows} of its {expected} "
                             f"rows: delete {_shard_name(shard)}* there and run the same command again")
        for row in outcome.to_pylist():
            if row["status"] == "success":
                stored += 1
                continue
            reason = (row["error_message"] or "other").partition(":")[0]
            failed[reason] += 1
            example.setdefault(reason, row["url"])
    return Report(rows, stored, dict(failed.most_common()), example)


def _downloader(options: Options, out: Path, scratch: Path) -> PolicedDownloader:
    resizer = UprightResizer(options.image_size, "keep_ratio", resize_only_if_bigger=True, encode_quality=_QUALITY)
    return PolicedDownloader(
        options.policy(), out, sample_writer_class=WebDatasetSampleWriter, resizer=resizer,
        thread_count=options.threads, save_caption=True, extract_exif=False, output_folder=str(scratch),
        column_list=list(_COLUMNS), timeout=options.timeout, number_sample_per_shard=options.shard_size,
        oom_shard_count=_DIGITS, compute_hash="sha256", verify_hash_type=None, encode_format="jpg",
        retries=options.retries, user_agent_token=None, disallowed_header_directives=None)


def _run(table: pq.ParquetFile, out: Path, options: Options) -> None:
    done = _finished(out)
    scratch = out / _SCRATCH / str(os.getpid())  # its own name, so that a dying worker of an earlier run cannot meddle
    scratch.mkdir(parents=True)
    downloader = _downloader(options, out.absolute(), scratch.absolute())
    tried, stored = _so_far(out, done)
    tasks = _tasks(table, options.shard_size, done, scratch)
    with Meter("downloading", table.metadata.num_rows, tried) as meter:
        for shard in in_processes(downloader.download_shard, tasks, options.processes):
            count, success = _so_far(out, {shard})
            tried, stored = tried + count, stored + success
            meter.at(tried, f"{100 * stored / tried:.1f}% stored")
    shutil.rmtree(out / _SCRATCH)


def _so_far(out: Path, shards: set[int]) -> tuple[int, int]:
    """Rows tried and rows stored in these finished shards."""
    stats = [json.loads((out / f"{_shard_name(shard)}_stats.json").read_text()) for shard in shards]
    return sum(s["count"] for s in stats), sum(s["successes"] for s in stats)


def download(urls: Path, out: Path, options: Options, command: str = "") -> Report:
    """Fetch every URL of the table into WebDataset shards in `out`, or go on where an earlier run was stopped.

    Raises InputError for a wrong table, option or folder, WorkFailed when nothing at all could be fetched.
    """
    began = time.monotonic()
    table = _table(urls)
    try:
        networks(options.allow_address)
    except ValueError as error:
        raise InputError(f"--allow-address: {error}") from None
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _bind(out, {"urls_sha256": sha256_of(urls), **options.binding()})
        (out / _REPORT).unlink(missing_ok=True)
        _run(table, out, options)
        report = _account(out, table.metadata.num_rows, options.shard_size)
        if report.stored == 0:
            reason, count = next(iter(report.failed.items()))
            raise WorkFailed(f"none of {report.rows:,} URLs could be fetched, {count:,} with \"{reason}\", "
                             f"e.g. {report.example[reason]}")
        versions = {name: version(name) for name in ("img2dataset", "pillow", "opencv-python-headless", "pyarrow")}
        write_json(out / _REPORT, {**asdict(report), "seconds": round(time.monotonic() - began, 1),
                                   "settings": asdict(options), "urls": str(urls), "versions": versions,
                                   "command": command})
    return report
