"""Bad samples met at run time: a line each, and the share of them that ends the run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import WorkFailed
from pipeline.files import naming
from pipeline.seals import read_lines, sealed_json

GRACE = 100  # samples before the share of bad ones means anything


def _alone(*counts: int) -> list[int]:
    return list(counts)


def _counts(line: dict) -> bool:
    return line.get("sample", True)


@dataclass
class Ledger:
    """Counts samples as they are delivered. `path` gets one JSON line (samples, shard, key, reason) for each bad one.

    A line with "sample": false tells of a tar's member that belongs to no sample; it does not count.

    over_ranks: counts of this process → their sums over all ranks, a collective. With it `seen` and `bad` are the whole
    run's, the ranks write to one file, and all of them stop at the same batch.
    """

    path: Path | None = None
    budget: float = 0.01
    seen: int = 0
    bad: int = 0
    over_ranks: Callable[..., list[int]] = _alone

    @classmethod
    def resumed(cls, path: Path, budget: float, samples_seen: int, over_ranks: Callable[..., list[int]] = _alone
                ) -> "Ledger":
        """The ledger of a run that stands at `samples_seen`; its lines about samples until there count."""
        lines = read_lines(path, "remove the line: its sample will not count")
        bad = sum(line["samples"] <= samples_seen and _counts(line) for line in lines)  # a faster rank may have added to them
        return cls(path, budget, samples_seen, bad, over_ranks)

    def count(self, samples: int, bad: list[dict]) -> None:
        """Record; raises WorkFailed once more than `budget` of at least GRACE samples were bad."""
        if bad and self.path:
            with naming(self.path), self.path.open("ab", buffering=0) as file:  # one write: ranks append to the same file
                file.write(b"".join(sealed_json(line) + b"\n" for line in bad))
        samples, found = self.over_ranks(samples, sum(map(_counts, bad)))
        self.seen, self.bad = self.seen + samples, self.bad + found
        if found and self.seen >= GRACE and self.bad > self.budget * self.seen:
            where = f"see {self.path}" if self.path or not bad else f"the last: {bad[-1]}"
            raise WorkFailed(f"{self.bad} of {self.seen} samples could not be decoded, more than the budget of "
                             f"{self.budget:.2%} (data.bad_sample_budget); {where}")
