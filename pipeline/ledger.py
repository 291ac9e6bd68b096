"""Bad samples met at run time: a line each, and the share of them that ends the run."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import WorkFailed

GRACE = 100  # samples before the share of bad ones means anything


@dataclass
class Ledger:
    """Counts samples as they are delivered. `path` gets one JSON line (samples, shard, key, reason) for each bad one."""

    path: Path | None = None
    budget: float = 0.01
    seen: int = 0
    bad: int = 0

    @classmethod
    def resumed(cls, path: Path, budget: float, samples_seen: int) -> "Ledger":
        """The ledger of a run that stands at `samples_seen`; its lines about earlier samples count."""
        lines = path.read_text().count("\n") if path.is_file() else 0
        return cls(path, budget, samples_seen, lines)

    def count(self, samples: int, bad: list[dict]) -> None:
        """Record; raises WorkFailed once more than `budget` of at least GRACE samples were bad."""
        self.seen, self.bad = self.seen + samples, self.bad + len(bad)
        if bad and self.path:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in bad))
        if bad and self.seen >= GRACE and self.bad > self.budget * self.seen:
            where = f"see {self.path}" if self.path else f"the last: {bad[-1]}"
            raise WorkFailed(f"{self.bad} of {self.seen} samples could not be decoded, more than the budget of "
                             f"{self.budget:.2%} (data.bad_sample_budget); {where}")
