"""The benchmark measures what it says: every way in, every stage, on the same files."""

import json

import pytest
from conftest import command


def test_the_benchmark_tells_and_writes_its_figures(scenes, tmp_path):
    out = tmp_path / "bench.json"
    done = command("uniclip-data", "bench", scenes / "train", "--samples", "8", "--rounds", "1", "--size", "64",
                   "--out", out)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert set(figures["ways"]) == {"torchvision", "pillow", "dali"}
    for name, way in figures["ways"].items():
        assert way["views_per_second"] == pytest.approx(3 * way["samples_per_second"])
        assert f"\n{name}" in done.stdout
    assert figures["ways"]["torchvision"]["times_baseline_per_core"] == 1
    spent = figures["pillow_stage_cpu_seconds_per_sample"]
    assert list(spent) == ["read", "decode", "resize", "mirror", "colour", "blur", "normalise"]
    assert sum(spent.values()) < 3 * figures["ways"]["pillow"]["cpu_seconds_per_sample"] + 0.01


def test_an_unknown_recipe_is_refused(scenes):
    done = command("uniclip-data", "bench", scenes / "train", "--recipe", "simclr")
    assert done.returncode == 2
    assert "known recipes are uniclip, 3weak" in done.stderr
