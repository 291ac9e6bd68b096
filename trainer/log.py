"""What a run tells: one console line, metrics.jsonl, TensorBoard, wandb."""

import hashlib
import math
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pipeline.console import InputError, say
from pipeline.files import replacing
from pipeline.seals import is_sealed, open_json, sealed_json
from trainer.checkpoint import writing
from trainer.config import RunConfig
from trainer.hints import Hints
from trainer.similarity import DOMAIN_PAIRS

METRICS, LEDGER = "metrics.jsonl", "bad_samples.jsonl"


def cut_back(path: Path, samples_seen: int) -> None:
    """Drop the lines about samples after `samples_seen`: after a kill the file continues as if never stopped."""
    if path.is_file():
        *lines, last = path.read_bytes().split(b"\n")
        lines += [last] * is_sealed(last)  # it lacks only its end; any other last line was torn by a kill
        told = [_samples(line) for line in lines]
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line, samples in zip(lines, told, strict=True)
                                           if samples is not None and samples <= samples_seen))
        if damaged := told.count(None):
            say(f"warning: {path}: {damaged} damaged lines are left out")


def _samples(line: bytes) -> int | None:
    """What it is about; None where it is damaged: a power cut may leave zeros."""
    try:
        samples = open_json(line).get("samples")
    except (ValueError, RecursionError):
        return None
    return samples if isinstance(samples, int) else None


class Log:
    """Writes each logged step everywhere. `samples` is the length of the run, `samples_seen` where it stands."""

    def __init__(self, run: RunConfig, samples: int, samples_seen: int):
        self._samples, self._folder = samples, run.folder
        for name in (METRICS, LEDGER):
            with self._writing(name):
                cut_back(run.folder / name, samples_seen)
        self._file = (run.folder / METRICS).open("ab", buffering=0)  # a full disk is met here, and not when it is closed
        with self._writing("tensorboard"):
            self._board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=samples_seen + 1)
        self._wandb = _wandb(run) if run.wandb else None
        self._hints = Hints(samples)

    def write(self, metrics: dict) -> None:
        """One step's numbers: scalars, or a list with a value for each domain pair, or a dict with one for each part."""
        self._everywhere(metrics)
        say(self._line(metrics))
        for hint in self._hints.of(metrics):
            say(f"  hint: {hint}")

    def evaluated(self, metrics: dict) -> None:
        """Results of an evaluation during training: `samples`, and numbers by name."""
        self._everywhere(metrics)
        say(f"samples {metrics['samples']:,}  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()
                                                            if name != "samples"))

    def _everywhere(self, metrics: dict) -> None:
        with self._writing(METRICS):
            line = sealed_json(_strict(metrics)) + b"\n"
            if (written := self._file.write(line)) != len(line):
                self._file.write(line[written:])  # a disk that is nearly full takes a part, and says so only now
        flat = {title: number for name, value in metrics.items() for title, number in _flat(name, value)}
        with self._writing("tensorboard"):
            for title, number in flat.items():
                self._board.add_scalar(title, number, metrics["samples"])
        if self._wandb:
            self._wandb.log(flat, step=metrics["samples"])

    def _line(self, m: dict) -> str:
        left = max(self._samples - m["samples"], 0) / max(m["samples_per_second"], 1e-9)
        temperature = "/".join(f"{t:.3f}" for t in m["temperature"])
        mfu = f"MFU {m['mfu']:.0%}  " if "mfu" in m else ""
        return (f"samples {m['samples']:,}/{self._samples:,}  loss {m['loss']:.4f} ({m['floor_loss']:.2f} – "
                f"{m['chance_loss']:.2f})  lr {m['lr']:.2e}  τ {temperature}  "
                f"{m['samples_per_second']:.0f} samples/s  {mfu}waiting for data {m['data_wait']:.1%}  "
                f"left {left // 60:.0f}:{left % 60:02.0f}")

    def _writing(self, name: str) -> AbstractContextManager[None]:
        """Within, a full disk is a WorkFailed that names the file."""
        return writing(self._folder / name,
                       f"the last checkpoint is whole; make room, then `uniclip-train resume {self._folder}`")

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        with self._writing("tensorboard"):
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _strict(value: Any) -> Any:
    """JSON knows no NaN: null takes its place."""
    if isinstance(value, dict):
        return {name: _strict(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(name: str, value: Any) -> list[tuple[str, float]]:
    """A metric as (title, number); what is not a number is left out."""
    if isinstance(value, list):
        value = dict(zip(DOMAIN_PAIRS, value, strict=True))
    numbers = [(f"{name}/{part}", x) for part, x in value.items()] if isinstance(value, dict) else [(name, value)]
    return [(title, number) for title, number in numbers if math.isfinite(number)]


def _wandb(run: RunConfig) -> Any:
    """The run at wandb, the same one after a resume."""
    try:
        wandb = import_module("wandb")
    except ImportError:
        raise InputError(f"run.wandb = {run.wandb!r} needs wandb: pip install wandb, or set run.wandb to \"\"") from None
    name = hashlib.sha256(str(run.folder).encode()).hexdigest()[:12]
    return wandb.init(project=run.wandb, name=run.folder.name, id=name, resume="allow", dir=str(run.folder))
