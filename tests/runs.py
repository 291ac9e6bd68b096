"""Runs of a very small model on the demonstration set, whole, killed, on several processes; and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import command

from trainer import checkpoint
from trainer.config import load_config
from trainer.train import train
from trainer.training import start

TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node"]
TINY = {"model.image.size": 24, "model.image.width": 32, "model.image.depth": 2, "model.image.heads": 2,
        "model.text.width": 32, "model.text.depth": 2, "model.text.heads": 2, "model.dim": 16, "optim.batch_size": 16,
        "optim.samples": 480, "optim.warmup_samples": 64, "run.save_every_samples": 48, "run.log_every": 1,
        "data.threads": 1}


def overrides(scenes: Path, folder: Path, **more) -> list[str]:
    values = {"data.index": scenes / "train", "run.folder": folder, **TINY, **more}
    return [f"{key}={value}" for key, value in values.items()]


def begin(scenes: Path, folder: Path, **more) -> Path:
    config = load_config("scenes-tiny", overrides(scenes, folder, **more))
    return train(config, start(config))


def trace(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["samples"], m["loss"], m["grad_norm"], *m["temperature"], *m["offset"]) for m in lines]


def weights(folder: Path) -> str:
    return checkpoint.read_state(checkpoint.find(folder)).hashes[checkpoint.WEIGHTS]


def run_until(folder: Path, words: list[str], samples: int) -> None:
    """Start the command and kill -9 it once it has logged `samples`."""
    process = subprocess.Popen([Path(sys.executable).parent / "uniclip-train", *words], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, start_new_session=True)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") * 16 >= samples:
            break
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()


def on_ranks(world: int, words: list[str]) -> None:
    """Run `uniclip-train` under torchrun."""
    done = command(*TORCHRUN, str(world), "--no-python", Path(sys.executable).parent / "uniclip-train", *words)
    assert done.returncode == 0, done.stderr


def losses(folder: Path) -> list[float]:
    return [row[2] for row in trace(folder)]
