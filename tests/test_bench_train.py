"""The trainer's benchmarks run at miniature size: the same loops, the same trainers, smaller models."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from runs import TINY

from tools.side_by_side import gpu_part

SIZES = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
         "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
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


@pytest.mark.slow
def test_both_trainers_train_side_by_side(scenes, tmp_path):
    """The part of tools.gpu_check, on the CPU."""
    figures = gpu_part(tmp_path, scenes / "train", "cpu", {"scenes-tiny": 16}, steps=8, settings=tuple(SMALL), sizes=SIZES,
                       batch=8, workers=2, repeats=1, compiled=(False,))
    run = figures["runs"]["scenes-tiny"]
    assert run["views_per_second"] == pytest.approx(3 * run["samples_per_second"], rel=0.5)
    assert 0 <= run["data_wait"] <= 1
    both = figures["open_clip"]["eager"]
    assert set(both["medians"]) == {"ours", "open_clip"}
    for key, ratio in both["ratios"].items():
        assert ratio == pytest.approx(both["medians"]["ours"][key] / both["medians"]["open_clip"][key])
    assert not figures["passed"]  # no MFU is known of a CPU
