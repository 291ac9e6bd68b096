"""The plan for W GPUs: terms by hand, limits, where constants come from, what the command says."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from pipeline.console import InputError, WorkFailed
from tools import scale, scale_machine
from tools.scale_machine import Known, Machine, given, measured
from tools.scale_model import Work, all_gather, all_reduce, choose, predict
from trainer.config_file import load_config, presets
from trainer.memory import sizes_of

BF16 = ["run.precision=bf16"]


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(load_config("scenes-tiny", BF16))


def test_flops_and_kernels_by_hand(work):
    """A ViT of 17 tokens and a text tower of 20, 128 wide, MLPs of 4 × 128; f_A and three residual blocks of 64 more."""
    def tower(tokens: int, blocks: int) -> int:
        return blocks * (2 * 12 * 128**2 * tokens + 2 * 2 * 128 * tokens**2)

    image = 2 * 16 * (3 * 12 * 12) * 128 + tower(17, 4)
    head = 2 * (11 * 64 + 2 * 64 * 64) + 3 * 2 * (192 * 128 + 128 * 128) + 2 * 128 * 128
    text = tower(20, 3) + 2 * 128 * 128
    assert work.tower_flops == 3 * (3 * (image + head) + text)
    assert work.loss_flops(1024) == 3 * 2 * (4 * 1024) * 4 * 128
    assert 20 * (4 + 3) < work.kernels < 100 * (4 + 3)


def test_seconds_by_hand(work):
    """Two ranks, ten groups each, on a machine of round numbers."""
    machine = Machine(towers=1e12, loss=1e12, launch=1e-12, host=1e-3, nvlink=1e9, nvlink_hop=1e-6, overlap=0, decode=1e12,
                      storage=1e18, memory_bandwidth=1e9)
    terms, weights = predict(work, machine, 2, 20).terms, work.trainable
    assert terms["towers"] == pytest.approx(10 * work.tower_flops / 1e12)
    mine = 40 * 40  # pairs, each computed once for both of its ends: four products of half the size; and thrice for others
    assert terms["loss"] == pytest.approx((4 * mine + 6 * mine) * 128 / 1e12)
    assert terms["gather"] == pytest.approx((20 * 16 + 80 * 128 * 2 + 80 * 4) / 2 / 1e9 + 3e-6)
    buckets = 1 + -(-(4 * weights - 2**20) // (25 * 2**20))
    assert terms["gradients"] == pytest.approx(4 * weights / 1e9 + 2 * buckets * 1e-6)
    assert terms["optimizer"] == pytest.approx(40 * weights / 1e9)
    assert terms["waiting"] == 0
    assert predict(work, machine, 2, 20).step == sum(terms.values())


def test_memory_is_the_trainers_own_model(work):
    for ranks, batch in ((1, 40), (8, 1000), (64, 4096)):
        config = load_config("scenes-tiny", [*BF16, f"optim.batch_size={batch}"])
        assert work.memory(ranks, batch) == pytest.approx(sum(sizes_of(config, ranks, "cuda").memory.values()), rel=0.02)


def test_alone_nothing_travels_and_more_gpus_never_compute_more(work):
    machine = Machine()
    alone = predict(work, machine, 1, 1024).terms
    assert alone["gather"] == alone["gradients"] == 0
    assert alone["loss"] == pytest.approx(4 * 4096**2 * 128 / machine.loss)
    terms = [predict(work, machine, 2**k, 1024).terms for k in range(10)]
    for less, more in zip(terms, terms[1:], strict=False):
        assert more["towers"] <= less["towers"]
        assert more["loss"] <= less["loss"]


def test_collectives_halve_with_twice_the_bandwidth():
    free = Machine(nvlink_hop=1e-30, network_hop=1e-30)
    twice = replace(free, nvlink=2 * free.nvlink, network=2 * free.network)
    for collective in (all_gather, all_reduce):
        for ranks in (2, 8, 64, 512):
            assert collective(free, ranks, 1e9) == pytest.approx(2 * collective(twice, ranks, 1e9))
            assert collective(Machine(), ranks, 1e9) > collective(free, ranks, 1e9)
        assert collective(free, 1, 1e9) == 0
    assert all_reduce(free, 8, 1e9) == pytest.approx(2 * 7 / 8 * 1e9 / free.nvlink)
    assert all_reduce(free, 16, 1e9) == pytest.approx(2 * 15 / 16 * 1e9 / min(free.nvlink, 8 * free.network))


def test_options_of_the_run_cost_what_they_do(work):
    machine = Machine(launch=1e-12)

    def terms(*settings: str, ranks: int = 8) -> dict[str, float]:
        return predict(Work(load_config("scenes-tiny", [*BF16, *settings])), machine, ranks, 1024).terms

    plain = terms()
    assert terms("run.recompute=true")["towers"] == pytest.approx(4 / 3 * plain["towers"])
    assert terms("optim.accumulation=4")["towers"] == pytest.approx(4 / 3 * plain["towers"])
    assert terms("run.sharding=fsdp")["optimizer"] == pytest.approx(plain["optimizer"] / 8)
    assert terms("loss.supervision=separate")["gather"] > plain["gather"]
    with pytest.raises(InputError, match="objective.name = 'slip'"):
        terms("objective.name=slip")


@pytest.mark.parametrize(("constants", "first"), [
    ({"towers": 1e10}, "towers"), ({"launch": 1.0}, "launches"), ({"host": 9.0}, "host"), ({"loss": 1e8}, "loss"),
    ({"nvlink": 1e5}, "gradients"), ({"nvlink_hop": 1.0, "overlap": 1e9}, "gather"), ({"memory_bandwidth": 1e6}, "optimizer"),
    ({"decode": 1.0}, "decoding"), ({"storage": 1e3}, "storage")])
def test_the_bottleneck_is_the_largest(work, constants, first):
    one = predict(work, replace(Machine(), **constants), 8, 4096)
    assert one.limits[0] == first
    stages = {**{name: seconds for name, seconds in one.terms.items() if name != "waiting"}, **one.beside}
    assert stages[first] == max(stages.values())
    assert one.step >= max(stages.values()) * (1 - 1e-9)


def test_the_batch_chosen_is_the_largest_good_one_that_fits(work):
    choice = choose(work, Machine(), 8, 32_768)
    every = {size: predict(work, Machine(), 8, size) for size in (8 * 2**k for k in range(13))}
    best = max(one.rate for one in every.values())
    good = [size for size, one in every.items() if one.rate >= 0.98 * best]
    assert (choice.best.batch, choice.least, choice.refused) == (good[-1], good[0], 0)
    small = choose(work, Machine(memory=every[2048].memory / 0.85), 8, 32_768)
    assert (small.best.batch, small.refused) == (2048, 4096)
    assert choose(work, Machine(), 8, 32_768, batch=96).best.batch == 96
    with pytest.raises(InputError, match="needs .* GiB of each"):
        choose(work, Machine(memory=1e6), 8, 32_768)
    with pytest.raises(InputError, match="64 GPUs, batches of at most 32"):
        choose(work, Machine(), 64, 32)


def record(status: str = "measured", **figures) -> dict:
    return {"status": status, "machine": "NVIDIA H200", "commit": "abc1234", "figures": figures}


FIGURES = {"parts": {
    "train.b32": record(ways={"eager": {"tflops": 380.0}, "compiled": {"tflops": 470.0}}),
    "train.b16": record(ways={"eager": {"tflops": 430.0}}),
    "loss.large": record(groups=65_536, seconds={"tiled": 0.4}),
    "stream.speed": {"status": "needs nvidia.dali", "machine": "NVIDIA H200", "commit": "abc1234"},
    "profile.b32": record(ceilings={"flops": 7e14, "bandwidth": 4e12})}}


def test_measured_figures_take_the_place_of_assumed_ones(tmp_path):
    path = tmp_path / "h200.json"
    path.write_text(json.dumps(FIGURES))
    known = Known().with_(*measured(path, "vit-b32"))
    assert known.machine.towers == 470e12
    assert known.machine.loss == pytest.approx(4 * 262_144**2 * 512 / 0.4)
    assert known.machine.memory_bandwidth == 4e12
    assert known.machine.decode == Machine().decode
    rows = {row["constant"]: row for row in known.rows()}
    assert rows["towers"]["is"] == rows["loss"]["is"] == "measured"
    assert rows["towers"]["from"] == "h200.json train.b32, NVIDIA H200, commit abc1234"
    assert rows["decode"]["is"] == rows["nvlink"]["is"] == "assumed"
    assert measured(path, "mine")[0]["towers"] == 430e12
    given_file = tmp_path / "ours.toml"
    given_file.write_text("towers = 3e14\nnetwork = 1e10\n")
    known = known.with_(*given(given_file))
    assert known.machine.towers == 3e14
    assert {row["constant"]: row["is"] for row in known.rows()}["network"] == "given"


def test_a_rehearsal_is_no_measurement(tmp_path):
    """The file is tools.gpu_check's own."""
    path = tmp_path / "rehearsal.json"
    done = subprocess.run([sys.executable, "-m", "tools.gpu_check", "--rehearse", "--part", "loss.large", "--out", path],
                          cwd=ROOT, capture_output=True, text=True)
    assert path.is_file(), done.stderr
    with pytest.raises(InputError, match="loss.large was rehearsed on a CPU"):
        measured(path, "vit-b32")
    told = json.loads(path.read_text())
    told["parts"]["loss.large"]["machine"] = "NVIDIA H200"
    path.write_text(json.dumps(told))
    assert measured(path, "vit-b32")[0]["loss"] > 0


@pytest.mark.parametrize("text", ["", "[]", '{"gpus": 3}', '{"parts": {"train.b32": {"figures": {"mfu": 0.4}}}}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(InputError, match=r"--measured .*other\.json: .*tools\.gpu_check"):
        measured(tmp_path / "other.json", "vit-b32")


def test_a_wrong_file_is_one_clear_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "tools.scale", "--measured", tmp_path / "none.json"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --measured {tmp_path / 'none.json'}: FileNotFoundError")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("text", "told"), [("nvlnk = 3", "nvlnk is no constant"), ("nvlink = 0", "above 0"),
                                            ("nvlink = 'a'", "above 0"), ("nvlink", "TOML")])
def test_a_wrong_constant_is_named(tmp_path, text, told):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(InputError, match=told):
        given(tmp_path / "x.toml")
    with pytest.raises(InputError, match="no.toml"):
        given(tmp_path / "no.toml")


def ran(*words: str) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return done.output


app = scale.typer.Typer(pretty_exceptions_enable=False)
app.command()(scale.main)


@pytest.mark.parametrize("preset", presets())
def test_a_table_for_every_preset(monkeypatch, tmp_path, preset):
    monkeypatch.setattr(scale, "MEASURED", tmp_path / "none.json")
    told = json.loads(ran(preset, "--price", "2.5", "--json", "--plot", str(tmp_path / "x.png")))
    assert [row["gpus"] for row in told["gpus"]] == [8, 64, 512]
    for row in told["gpus"]:
        assert 0 < row["mfu"] < 0.45
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["step_seconds"])
        assert row["days"] == pytest.approx(told["samples"] / row["samples_per_second"] / 86_400)
        assert row["cost"] == pytest.approx(2.5 * row["gpus"] * 24 * row["days"])
        assert row["memory_bytes"] < 0.85 * Machine().memory
    assert {row["is"] for row in told["constants"]} == {"assumed"}
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "MEASURED", tmp_path / "none.json")
    said = ran("scenes-tiny", "--gpus", "16", "--gpus", "2", "--samples", "1000000", "--batch", "512", "--price", "1")
    lines = {line[:28].strip(): line[28:].split() for line in said.splitlines() if line}
    assert lines["GPUs"] == ["2", "16"]
    assert lines["global batch"] == ["512", "512"]
    assert "1,000,000 samples" in said
    for name in ("MFU", "days", "GPU-hours", "cost", "first bottleneck"):
        assert len(lines[name]) == 2
    steps = [float(number.replace(",", "")) for number in lines["step, ms"]]
    parts = [[float(number.replace(",", "")) for number in lines[term]] for term in
             ("towers", "launches", "host", "loss", "gather", "gradients", "optimizer", "waiting")]
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(steps, abs=0.5)
    assert all(row["constant"] in said for row in Known().rows())


def test_the_constants_of_the_loss_are_the_benchmarks():
    from tools import bench_loss
    assert (scale_machine.VIEWS, scale_machine.TEXTS, scale_machine.WIDTH) == (
        bench_loss.VIEWS, bench_loss.TEXTS, bench_loss.WIDTH)


def test_a_process_that_is_gone_ends_the_measurement_with_a_word(tmp_path):
    from tools.scale_validate import World
    world = World(load_config("scenes-tiny", ["model.text.vocabulary=train"]), 1, tmp_path)
    try:
        assert min(world.seconds("matmul", 8)) >= 0
        world._processes[0].kill()
        with pytest.raises(WorkFailed, match="one of 1 processes ended while it measured matmul of 8"):
            world.seconds("matmul", 8)
    finally:
        world.close()


@pytest.mark.slow
def test_processes_on_this_cpu_are_predicted():
    """That it runs and is not absurd: times depend on what else the machine does."""
    from tools.scale_validate import WORLDS, validate
    for of in validate(rounds=3, batch=64):
        assert [one.ranks for one in of.predictions] == list(WORLDS)
        for one in of.predictions:
            assert 1 / 4 < of.ratio(one) < 4
