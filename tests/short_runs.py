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
from trainer.config_file import load_config
from trainer.train import train
from trainer.training import start

PROGRAM = Path(sys.executable).parent / "uniclip-train"
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


def launch(world: int, words: list[str]) -> subprocess.Popen:
    ranks = [PROGRAM.parent / TORCHRUN[0], *TORCHRUN[1:], str(world), "--no-python"] if world > 1 else []
    return subprocess.Popen([*ranks, PROGRAM, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill(process: subprocess.Popen) -> None:
    """The process and those it started: torchrun puts its workers into sessions of their own."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.01)


def steps(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def run_until(process: subprocess.Popen, folder: Path, step: int, pause: float = 0.0) -> bool:
    """Whether it was killed, `pause` seconds after it logged `step`; it may have ended before."""
    deadline = time.monotonic() + 200
    while steps(folder) < step:
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[1].decode()
            process.communicate()
            return False
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(pause)
    kill(process)
    return True


def on_ranks(world: int, words: list[str]) -> None:
    """Run `uniclip-train` under torchrun."""
    done = command(*TORCHRUN, str(world), "--no-python", PROGRAM, *words)
    assert done.returncode == 0, done.stderr


def losses(folder: Path) -> list[float]:
    return [row[2] for row in trace(folder)]
