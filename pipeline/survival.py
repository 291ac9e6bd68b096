"""What became of every URL: the per-shard tables that img2dataset leaves, added up by outcome."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline import parquet
from pipeline.console import InputError, WorkFailed
from pipeline.seals import UNREADABLE, Damaged
from pipeline.stores import Store

DIGITS = 5  # of a shard's number
SUFFIXES = (".tar", ".parquet", "_stats.json")  # a shard's files, the last one written last
SUMS = "sha256"  # in a shard's _stats.json: suffix → sha256 of its tar and its table; older ones have none
FORGOTTEN = "forgotten"  # the class of a URL that a takedown names: never asked for


def percent(part: int, whole: int) -> str:
    """With one decimal; a few are never shown as none, nor nearly all as all."""
    share = 100 * part / whole
    return "<0.1" if 0 < share < 0.05 else ">99.9" if 99.95 <= share < 100 else f"{share:.1f}"


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
        return [f"{count:>12,}  {percent(count, self.rows):>5}%  {what}" for what, count in outcomes.items()]


def shard_name(shard: int) -> str:
    """As img2dataset names it."""
    return f"{shard:0{DIGITS}d}"


def shard_files(shard: int) -> list[str]:
    """The names of a shard's files."""
    return [f"{shard_name(shard)}{suffix}" for suffix in SUFFIXES]


def outcomes(store: Store, shard: int, columns: Iterable[str]) -> pa.Table:
    """A shard's rows: these columns, and `reason`, the class of the failure, empty where the image was stored.

    Raises InputError for a damaged file.
    """
    wanted = list(dict.fromkeys([*columns, "status", "error_message"]))
    name, told = f"{shard_name(shard)}.parquet", store.read_json(f"{shard_name(shard)}_stats.json").get(SUMS, {})
    try:
        data = store.read(name)
        if told and told.get(".parquet") != hashlib.sha256(data).hexdigest():
            raise Damaged
        file, _ = parquet.read(data)
        table = file.read(columns=[name for name in wanted if name in file.schema_arrow.names])
    except UNREADABLE as error:
        raise InputError(f"{store}/{shard_name(shard)}.parquet is damaged ({error}): delete {shard_name(shard)}* there and "
                         "run the download again") from None
    told = zip(table["status"].to_pylist(), table["error_message"].to_pylist(), strict=True)
    reasons = ["" if status == "success" else (message or "other").partition(":")[0] for status, message in told]
    return table.drop_columns(["status", "error_message"]).append_column("reason", pa.array(reasons, pa.string()))


def account(store: Store, rows: int, size: int) -> Report:
    """Add up every shard's rows by outcome. Raises WorkFailed where a shard does not account for all of its rows."""
    stored, failed, example = 0, Counter(), {}
    for shard in range(-(-rows // size)):
        found = outcomes(store, shard, ["url"])
        expected = min(size, rows - shard * size)
        if found.num_rows != expected:
            raise WorkFailed(f"{store}/{shard_name(shard)}.parquet accounts for {found.num_rows} of its {expected} "
                             f"rows: delete {shard_name(shard)}* there and run the same command again")
        for url, reason in zip(found["url"].to_pylist(), found["reason"].to_pylist(), strict=True):
            if not reason:
                stored += 1
                continue
            failed[reason] += 1
            example.setdefault(reason, url)
    return Report(rows, stored, dict(failed.most_common()), example)


def so_far(store: Store, shards: Iterable[int]) -> tuple[int, int]:
    """Rows tried and rows stored in these finished shards."""
    stats = [store.read_json(f"{shard_name(shard)}_stats.json") for shard in shards]
    return sum(s["count"] for s in stats), sum(s["successes"] for s in stats)


def shards_of(folder: Path) -> Iterator[int]:
    """Numbers of the finished shards of a folder."""
    yield from sorted(int(path.name.partition("_")[0]) for path in folder.glob("*_stats.json"))
