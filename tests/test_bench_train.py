"""The trainer's benchmarks run at miniature size: the same loops, the same trainers, smaller models."""

import json
import subprocess
import sys

from conftest import ROOT
from short_runs import TINY

SMALL = [f"{key}={value}" for key, value in TINY.items() if key.startswith(("model.", "data."))]


def test_the_loops_are_compared_and_the_figures_written(scenes, tmp_path):
    """Without a model for both trainers: that takes open_clip's import, six times."""
    settings = [word for setting in [*SMALL, "optim.batch_size=16"] for word in ("--set", setting)]
    done = subprocess.run([sys.executable, "-m", "tools.bench_train", "--shards", scenes / "train", "--presets", "scenes-tiny",
                           "--steps", "12", "--save-every", "4", "--models", "", "--out", tmp_path, *settings],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row, = json.loads((tmp_path / "train-cpu.json").read_text())["overhead"]
    assert row["steps"] == 12 and row["batch"] == 16 and row["views"] == 3
    assert 0 < row["bare_step_seconds"] < row["bare_step_seconds"] + row["extra_seconds"]["logged"]
    assert -0.5 < row["overhead_cpu"] < 20 and row["other_threads"] > 0
    assert row["passed"] == (row["overhead_cpu"] <= 0.03)
    assert "| scenes-tiny | 16 |" in (tmp_path / "train-cpu.md").read_text()
