"""What a run tells: one console line, metrics.jsonl, TensorBoard."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from pipeline.console import say
from trainer.similarity import DOMAIN_PAIRS

METRICS, LEDGER = "metrics.jsonl", "bad_samples.jsonl"


def cut_back(path: Path, samples_seen: int) -> None:
    """Drop the lines about samples after `samples_seen`: after a kill the file continues as if never stopped."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["samples"] <= samples_seen]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)


class Log:
    """Writes each logged step everywhere. `samples` is the length of the run, `samples_seen` where it stands."""

    def __init__(self, run: Path, samples: int, samples_seen: int):
        self._samples = samples
        for name in (METRICS, LEDGER):
            cut_back(run / name, samples_seen)
        self._file = (run / METRICS).open("a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=samples_seen + 1)

    def write(self, metrics: dict) -> None:
        """One step's numbers: scalars, or a list with a value for each domain pair."""
        self._file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            values = dict(zip((f"{name}/{pair}" for pair in DOMAIN_PAIRS), value, strict=True)) \
                if isinstance(value, list) else {name: value}
            for title, number in values.items():
                self._board.add_scalar(title, number, metrics["samples"])
        say(self._line(metrics))

    def _line(self, m: dict) -> str:
        left = max(self._samples - m["samples"], 0) / max(m["samples_per_second"], 1e-9)
        temperature = "/".join(f"{t:.3f}" for t in m["temperature"])
        return (f"samples {m['samples']:,}/{self._samples:,}  loss {m['loss']:.4f} (chance {m['chance_loss']:.2f})  "
                f"lr {m['lr']:.2e}  τ {temperature}  "
                f"{m['samples_per_second']:.0f} samples/s  waiting for data {m['data_wait']:.1%}  "
                f"left {left // 60:.0f}:{left % 60:02.0f}")

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        self._board.close()
