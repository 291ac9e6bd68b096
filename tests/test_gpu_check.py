"""The GPU check runs wherever one starts it; what it computes is right on the CPU too."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from tools import gpu_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_lists_its_parts(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tools.gpu_check", tmp_path / "out.json"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0
    assert done.stdout.strip() == f"no CUDA device; parts: {', '.join(gpu_check.PARTS)}"
    assert not (tmp_path / "out.json").exists()


def test_pixels_agree_on_768_views_of_photographs(tmp_path):
    """DALI on the CPU in the GPU's place."""
    figures = gpu_check.check_pixels(tmp_path / "photos", "cpu")
    assert figures["vectors_bit_equal"]
    assert figures["views"] == 768
    assert figures["passed"], figures


@pytest.mark.slow
def test_the_speed_parts_run(tmp_path):
    figures = gpu_check.measure_loader(tmp_path / "a", "cpu", 64, 16)
    assert figures["samples_per_second"] > 0
    assert gpu_check.measure_torchvision(tmp_path / "b", 8)["samples_per_second"] > 0


def test_a_part_that_dies_is_a_failed_part(monkeypatch):
    died = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: out of memory\n")
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: died)
    assert gpu_check.run_part("stream.pixels") == {"passed": False, "error": ["RuntimeError: out of memory"]}
