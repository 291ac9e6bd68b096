"""What became of every URL: the per-shard tables that img2dataset leaves, added up by outcome."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.console import WorkFailed

DIGITS = 5  # of a shard's number
SUFFIXES = (".tar", ".parquet", "_stats.json")  # a shard's files


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


def shard_name(shard: int) -> str:
    """As img2dataset names it."""
    return f"{shard:0{DIGITS}d}"


def shard_files(folder: Path, shard: int) -> list[Path]:
    """Where a shard's files are, or would be."""
    return [folder / f"{shard_name(shard)}{suffix}" for suffix in SUFFIXES]


def account(out: Path, rows: int, size: int) -> Report:
    """Add up every shard's rows by outcome. Raises WorkFailed where a shard does not account for all of its rows."""
    stored, failed, example = 0, Counter(), {}
    for shard in range(-(-rows // size)):
        outcome = pq.read_table(out / f"{shard_name(shard)}.parquet", columns=["url", "status", "error_message"])
        expected = min(size, rows - shard * size)
        if outcome.num_rows != expected:
            raise WorkFailed(f"{out}/{shard_name(shard)}.parquet accounts for {outcome.num_rows} of its {expected} "
                             f"rows: delete {shard_name(shard)}* there and run the same command again")
        for row in outcome.to_pylist():
            if row["status"] == "success":
                stored += 1
                continue
            reason = (row["error_message"] or "other").partition(":")[0]
            failed[reason] += 1
            example.setdefault(reason, row["url"])
    return Report(rows, stored, dict(failed.most_common()), example)


def so_far(out: Path, shards: set[int]) -> tuple[int, int]:
    """Rows tried and rows stored in these finished shards."""
    stats = [json.loads((out / f"{shard_name(shard)}_stats.json").read_text()) for shard in shards]
    return sum(s["count"] for s in stats), sum(s["successes"] for s in stats)
