"""The GPU check runs wherever one starts it; every part's code runs here first, on the CPU at toy sizes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from conftest import ROOT
from typer.testing import CliRunner, Result

from tools import bench_loss
from tools.gpu_check import good, main, table
from tools.gpu_loss import gradients
from tools.gpu_parts import PARTS, Target
from trainer.losses import dense_loss

QUICK = ("stream.pixels", "loss.gradients", "train.resume", "profile.b32")  # in the daily tests, too
PLANTED = {"sklearn": "raise RuntimeError('planted')",
           "open_clip_train": "raise ModuleNotFoundError('none here', name='open_clip_train')"}


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(main)


def rehearsed(names: tuple[str, ...], out: Path, *words: str) -> tuple[Result, dict]:
    """The command in this process, its parts in theirs."""
    done = CliRunner().invoke(app, ["--rehearse", "--out", str(out), *words, *(w for name in names for w in ("--part", name))])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done, json.loads(out.read_text())["parts"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_lists_parts_and_targets_and_changes_nothing():
    """Its --out is where the repository's own figures are."""
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks").iterdir()}
    done = subprocess.run([sys.executable, "-m", "tools.gpu_check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("no CUDA device")
    assert done.stdout.endswith(table({}) + "\n")
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks").iterdir()}


def test_every_target_of_the_design_has_its_part():
    asked = {(part, target.figure, str(target)) for part, of in PARTS.items() for target in of.targets if str(target)}
    assert asked >= {
        ("loss.large", "gib", "≤ 4 GiB"), ("loss.large", "rate_ratio", "≥ 0.5 ×"),
        ("stream.speed", "samples_per_second", "≥ 6,000"),
        *((f"train.waiting-{size}", "data_wait", "≤ 0.02") for size in ("b32", "b16")),
        *((f"train.{size}", "mfu", "≥ 0.45") for size in ("b32", "b16")),
        *((f"train.open_clip-{size}{way}", "ratio", "≥ 1.15 ×") for size in ("b32", "b16") for way in ("", "-compiled"))}


def test_verdicts():
    least, most, yes = Target("x", "y", least=1.5), Target("x", "y", most=2, exact=True), Target("x", "y", least=True)
    assert [least.verdict(x) for x in (1.5, 1.4, math.nan)] == ["met", "missed", "missed"]
    assert [most.verdict(x, miniature=True) for x in (2, 2.1)] == ["met", "missed"]
    assert [yes.verdict(x) for x in (True, False)] == ["met", "missed"]
    assert least.verdict(0, miniature=True) == Target("x", "y").verdict(0) == "measured"
    record = {"status": "measured", "machine": "NVIDIA H200", "figures": {"gib": 3.0, "rate_ratio": 0.4}}
    assert not good("loss.large", record) and "| 3 GiB | ≤ 4 GiB |" in table({"loss.large": record})
    record["figures"]["rate_ratio"] = 0.6
    assert good("loss.large", record) and good("loss.large", {"status": "needs triton"})


def test_a_gradient_that_is_not_finite_is_no_small_difference(monkeypatch):
    monkeypatch.setitem(bench_loss.OTHERS, "torch", lambda name, image, text, *similarity: dense_loss(
        name, image, text, *similarity) + math.nan * text.sum())
    found = gradients(Path(), "cpu", 8)
    assert found["tiled_float32"] < 1e-3 and all(math.isnan(found[name]) for name in ("torch_float32", "float32", "bfloat16"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("check") / "figures.json"
    return rehearsed(QUICK, out)[0], out


def test_parts_are_measured_and_what_is_exact_holds_on_the_cpu_too(quick):
    done, out = quick
    assert done.exit_code == 0, done.output
    parts = json.loads(out.read_text())["parts"]
    assert set(parts) == set(QUICK)
    for name, record in parts.items():
        assert record["status"] == "measured" and record["commit"] and "torch" in record["versions"]
        assert {target.verdict(record["figures"][target.figure], True) for target in PARTS[name].targets} <= {"met"}
        assert "markdown" not in record["figures"]
    assert parts["stream.pixels"]["figures"]["views"] == 768
    assert out.with_suffix(".md").read_text().endswith(table(parts))
    assert "| of product |" in (out.parent / "figures-profile.b32.md").read_text()


def test_what_is_measured_is_passed_over_and_others_are_merged(quick):
    _, out = quick
    before = json.loads(out.read_text())["parts"]
    done, parts = rehearsed(("loss.gradients", "stream.pixels"), out)
    assert done.exit_code == 0 and parts == before
    assert done.output.count("measured before") == 2
    _, parts = rehearsed(("loss.gradients",), out, "--again")
    assert parts.pop("loss.gradients")["seconds"] != before["loss.gradients"]["seconds"]
    assert parts == {name: record for name, record in before.items() if name != "loss.gradients"}
    out.write_text(json.dumps({"parts": {name: record | {"sources": "older"} for name, record in before.items()}}))
    done, parts = rehearsed(("loss.gradients",), out)
    assert "measured before" not in done.output
    assert {name for name, record in parts.items() if record["sources"] == "older"} == set(QUICK) - {"loss.gradients"}


def test_a_part_that_fails_or_lacks_a_package_stops_no_other(tmp_path, monkeypatch):
    for name, line in PLANTED.items():
        (tmp_path / f"{name}.py").write_text(line)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done, parts = rehearsed(("stream.pixels", "train.open_clip-b32", "loss.gradients"), tmp_path / "out.json")
    assert done.exit_code == 1
    assert {name: record["status"] for name, record in parts.items()} == {
        "stream.pixels": "failed with exit status 1: RuntimeError: planted", "train.open_clip-b32": "needs open_clip_train",
        "loss.gradients": "measured"}
    assert "not measured: needs open_clip_train" in done.output


def test_a_part_out_of_time_ends_with_its_children(tmp_path):
    done, parts = rehearsed(("stream.speed", "loss.gradients"), tmp_path / "out.json", "--minutes", "0.01")
    assert done.exit_code == 1
    assert all(record["status"].startswith("out of time after 1 s") for record in parts.values())
    assert not subprocess.run(["pgrep", "-f", "tools.gpu_parts stream.speed"], capture_output=True).stdout


def test_an_unknown_part_is_refused():
    done = CliRunner().invoke(app, ["--part", "strem"])
    assert done.exit_code == 2 and "parts are stream.pixels, stream.speed" in " ".join(done.output.replace("│", " ").split())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARTS if name not in QUICK])
def test_every_other_part_runs(name, tmp_path):
    done, parts = rehearsed((name,), tmp_path / "out.json", "--minutes", "15")
    assert done.exit_code == 0, parts
    figures = parts[name]["figures"]
    for target in PARTS[name].targets:
        assert figures[target.figure] > 0 or target.figure in ("data_wait", "device_gib", "cpu")  # CPU against CPU
    assert 0 <= figures.get("data_wait", 0) <= 1
    if "open_clip" in figures:
        assert figures["ratio"] == pytest.approx(figures["images_per_second"] / figures["open_clip"])
