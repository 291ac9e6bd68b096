"""Retry of failures that may heal: each round is a download of its own in a sub-folder, so it resumes and counts as one.

    DIR/00000.tar …          the download
    DIR/retry1/urls.parquet  what could still heal after it, with the original ids
    DIR/retry1/00000.tar …   what did
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import parquet
from pipeline.console import InputError
from pipeline.download import REPORT, SETTINGS, Options, download
from pipeline.fetch import may_heal
from pipeline.schema import URLS
from pipeline.skips import forgotten_ids
from pipeline.stores import Store
from pipeline.survival import Report, outcomes, shards_of

_URLS_NAME = "urls.parquet"


def rounds(folder: Path) -> list[Path]:
    """The download and its retries, in order."""
    numbered = sorted(int(path.name.removeprefix("retry")) for path in folder.glob("retry*")
                      if path.name.removeprefix("retry").isdecimal() and (path / _URLS_NAME).exists())
    return [folder, *(folder / f"retry{number}" for number in numbered)]


def retry(folder: Path, speed: dict, command: str = "") -> tuple[Path, Report] | None:
    """Run the next round, or finish the last one; None when nothing can heal. speed: options that bind nothing.

    Raises InputError where there is no finished download.
    """
    if not (folder / SETTINGS).exists() or not (folder / REPORT).exists():
        raise InputError(f"{folder} holds no finished download: run `uniclip-data download` to its end first")
    settings = Store(folder).read_json(SETTINGS)
    binding = {name: settings[name] for name in Options().binding() if name in settings}
    options = Options(**{**speed, **binding, "allow_address": tuple(binding["allow_address"])})
    before = rounds(folder)
    where = before[-1]
    if (where / REPORT).exists():
        where = folder / f"retry{len(before)}"
        if not _write_healable(where / _URLS_NAME, before[-1], forgotten_ids(Store(folder))):
            return None
    return where, download(where / _URLS_NAME, where, options, command, may_be_empty=True)


def _write_healable(path: Path, last: Path, forgotten: np.ndarray) -> int:
    """The rows that failed in `last` and may heal → `path`; how many. Nothing is written when there are none."""
    count = 0
    with parquet.writing(path, URLS) as writer:
        for rows in _healable(last, forgotten):
            count += rows.num_rows
            writer.write_table(rows)
    if not count:
        path.unlink()
        path.parent.rmdir()
    return count


def _healable(folder: Path, forgotten: np.ndarray) -> Iterator[pa.Table]:
    store = Store(folder)
    for shard in shards_of(folder):
        rows = outcomes(store, shard, URLS.names)
        if "source_row" not in rows.column_names:  # downloaded before this column was kept
            rows = rows.append_column("source_row", pa.array(np.zeros(rows.num_rows, np.int64)))
        heals = np.array([may_heal(reason) for reason in rows["reason"].to_pylist()], bool)
        heals &= ~np.isin(rows["sample_id"].to_numpy(), forgotten)
        if heals.any():
            yield rows.filter(pa.array(heals)).select(URLS.names).cast(URLS).sort_by("source_row")


def survival(folder: Path) -> dict[str, Report]:
    """Source → what became of its URLs after all rounds: the last word on each row counts."""
    stored, failed, examples = Counter(), {}, {}
    for number, place in enumerate(rounds(folder)):
        for shard in shards_of(place):
            rows = outcomes(Store(place), shard, ["url", "source"])
            counted = rows.group_by(["source", "reason"]).aggregate([("url", "count"), ("url", "min")])
            for source, reason, count, example in zip(*(counted[name].to_pylist() for name in (
                    "source", "reason", "url_count", "url_min")), strict=True):
                failures = failed.setdefault(source, Counter())
                examples.setdefault(source, {}).setdefault(reason, example)
                if reason:
                    failures[reason] += count
                else:
                    stored[source] += count
        if number:
            _take_back(place, rounds(folder)[number - 1], failed)
    return {source: Report(stored[source] + failures.total(), stored[source], dict((+failures).most_common()),
                           {reason: examples[source][reason] for reason in +failures})
            for source, failures in sorted(failed.items())}


def _take_back(place: Path, before: Path, failed: dict[str, Counter]) -> None:
    """What `place` tried again no longer counts as it ended in the round before."""
    done = list(shards_of(place))
    if not done:  # a retry that was stopped before its first shard
        return
    tried = pa.concat_tables([outcomes(Store(place), shard, ["sample_id"]) for shard in done])["sample_id"]
    for shard in shards_of(before):
        rows = outcomes(Store(before), shard, ["sample_id", "source"])
        again = rows.filter(pc.is_in(rows["sample_id"], value_set=tried))  # pyright: ignore[reportAttributeAccessIssue]
        for source, reason in zip(again["source"].to_pylist(), again["reason"].to_pylist(), strict=True):
            failed[source][reason] -= 1


def together(folders: Iterable[Path]) -> dict[str, dict]:
    """The same over several downloads, which may share a source; for JSON."""
    found: dict[str, Report] = {}
    for folder in folders:
        for source, one in survival(folder).items():
            other = found.get(source, Report(0, 0, {}, {}))
            failed = Counter(other.failed) + Counter(one.failed)
            found[source] = Report(other.rows + one.rows, other.stored + one.stored, dict(failed.most_common()),
                                   one.example | other.example)
    return {source: asdict(report) for source, report in found.items()}
