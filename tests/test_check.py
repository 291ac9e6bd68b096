"""`check` finds what is planted and nothing in a healthy run; its memory is the one a process needs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import command, encoded, picture
from shards import write_set
from webserver import serving

from pipeline.index import Index
from trainer import trial
from trainer.check import check
from trainer.config_file import load_config, presets
from trainer.memory import Live, loss_bytes, sizes_of
from trainer.tiles import tiled_loss
from trainer.verdict import Verdict, show

TINY = {"model.image.size": 24, "model.image.width": 32, "model.image.depth": 2, "model.image.heads": 2, "model.text.width": 32,
        "model.text.depth": 2, "model.text.heads": 2, "model.dim": 16, "optim.batch_size": 16, "optim.samples": 480,
        "optim.warmup_samples": 64, "run.save_every_samples": 48, "data.threads": 1, "data.executor": "pillow"}
HEALTHY = {"data.executor": "pillow", "optim.batch_size": 24, "optim.samples": 48_000, "optim.warmup_samples": 2400,
           "model.image.depth": 2, "model.text.depth": 1}


def config(scenes: Path, folder: Path, **more):
    values = {"data.index": scenes / "train", "run.folder": folder, **more}
    return load_config("scenes-tiny", [f"{key}={value}" for key, value in values.items()])


def judge(*given, **more) -> dict[str, Verdict]:
    """The verdicts by what they are of."""
    return {verdict.what: verdict for verdict in check(config(*given, **more))}


def bad(verdicts: dict[str, Verdict]) -> set[str]:
    """Without the speed of so small a model, which may well wait for its data."""
    return {what for what, verdict in verdicts.items() if verdict.level == "bad" and what != "speed"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 0.3)


def test_nothing_is_bad_in_a_healthy_run_and_nothing_is_written(scenes, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in scenes.rglob("*")}
    verdicts = judge(scenes, tmp_path / "run", **HEALTHY)
    assert bad(verdicts) == set(), verdicts
    assert verdicts["speed"].level != "bad" and show(verdicts.values()) == 0
    assert verdicts.keys() >= {"steps", "weights", "memory", "cost", "folder", "disk", "data", "left out", "captions", "twins",
                               "decoding", "gradients", "one batch", "speed"}
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in scenes.rglob("*")} == before


def corrupt(scenes: Path, folder: Path) -> dict:
    """Every second image of a copy of the shards is noise of the same size."""
    index = Index.open(scenes / "train")
    for name in (*index.shards, "index.arrow", "manifest.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((scenes / "train" / name).read_bytes())
    columns = index.columns(np.arange(0, len(index), 2))
    for shard, offset, size in zip(columns["shard"], columns["offset"], columns["size"], strict=True):
        with (folder / index.shards[shard]).open("r+b") as tar:
            tar.seek(offset)
            tar.write(bytes(size))
    return {"data.index": folder}


def alike(_: Path, folder: Path) -> dict:
    """Forty pictures, one caption."""
    write_set(folder, [(encoded(picture(n)), {"caption": "a photo"}) for n in range(40)])
    return {"data.index": folder}


ALL_STILL = "{image=0, text=0, augmentation=0, image_head=0, text_head=0, similarity=0}"
ILLNESSES = {  # → the bad verdicts, and what is planted
    "half of the images are noise": ("decoding", corrupt),
    "one caption for all": ("one batch, twins", alike),
    "captions longer than the context": ("captions", {"model.text.context": 5}),
    "a rate so high that nothing is learnt": ("one batch", {"optim.lr": 1.0}),
    "a rate so high that gradients overflow": ("gradients, one batch", {"optim.lr": 1e3}),
    "every part at rest": ("gradients, one batch", {"optim.lr_scale": ALL_STILL}),
    "a batch larger than the set and the memory": ("data, memory, twins", {"optim.batch_size": 3_000_000,
                                                                            "optim.samples": 9_000_000}),
    "weights larger than memory and disk": ("disk, memory, weights", {"model.image.width": 65536, "model.image.depth": 24}),
    "a warm-up longer than the run": ("warm-up", {"optim.warmup_samples": 480}),
    "no room for checkpoints, no way to their mirror": ("disk, mirror", {"run.folder": "/proc/nowhere/run",
                                                                         "run.mirror": "http://127.0.0.1:1/runs"}),
    "a model that cannot be built": ("model", {"model.image.heads": 5}),
}


@pytest.mark.parametrize("name", ILLNESSES)
def test_planted_illnesses_are_found_and_no_others(scenes, tmp_path, name):
    whats, planted = ILLNESSES[name]
    verdicts = judge(scenes, tmp_path / "run", **{**TINY, **(planted(scenes, tmp_path) if callable(planted) else planted)})
    assert ", ".join(sorted(bad(verdicts))) == whats, verdicts


def test_shards_on_a_slow_server_are_found_to_bind(scenes, tmp_path):
    def slowly(handler) -> None:
        first, _, last = handler.headers.get("Range", "0-").removeprefix("bytes=").partition("-")
        data = (scenes / "train" / handler.path[1:]).read_bytes()[int(first):int(last or 2**40) + 1]
        time.sleep(1)
        handler.send_response(206)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    with serving() as site:
        site.pages = {f"/{name}": slowly for name in Index.open(scenes / "train").shards}
        verdicts = judge(scenes, tmp_path / "run", **{**TINY, "data.shards": site.url("")})
    assert bad(verdicts) == set(), verdicts
    assert verdicts["speed"].level == "bad" and "data bind" in verdicts["speed"].found


def test_what_was_left_out_is_counted_and_an_older_run_is_seen(scenes, tmp_path):
    index = Index.open(scenes / "train")
    ids = pa.array(index.columns(np.arange(7))["sample_id"])
    pq.write_table(pa.table({"sample_id": ids}), tmp_path / "skip.parquet")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("000000000016")
    verdicts = judge(scenes, tmp_path, **{**TINY, "data.skip": f"[{str(tmp_path / 'skip.parquet')!r}]"})
    assert verdicts["left out"].found.startswith(f"7 of {len(index)} by skip lists, 0 by takedowns")
    assert f"{len(index) - 7} samples an epoch" in verdicts["data"].found
    assert (verdicts["folder"].level, bad(verdicts)) == ("warn", set())
    assert "uniclip-train resume" in verdicts["folder"].cure


def test_a_stream_is_checked_too(scenes, tmp_path):
    tars = " ".join(str(path) for path in sorted((scenes / "train").rglob("*.tar")))
    verdicts = {v.what: v for v in check(load_config("scenes-tiny", [
        f"data.stream={tars}", f"run.folder={tmp_path / 'run'}", *(f"{key}={value}" for key, value in TINY.items())]))}
    assert bad(verdicts) == set(), verdicts
    assert verdicts.keys() >= {"data", "captions", "twins", "decoding", "one batch"}


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_fine_as_far_as_it_can_be_told_without_data(name):
    verdicts = {v.what: v for v in check(load_config(name), dry=True)}
    assert bad(verdicts) == set()
    assert "modelled" in verdicts["memory"].found
    assert "modelled" in verdicts["cost"].found


def test_the_command_says_a_line_for_each_and_exits_1():
    done = command("uniclip-train", "check", "scenes-tiny", "--dry", "--set", "optim.warmup_samples=60_000")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert {line.split(":")[0].split()[0] for line in lines} == {"ok", "bad"}
    assert [line for line in lines if line.startswith("bad")] == [
        "bad  warm-up: 60,000 samples, 100% of the run → the run ends before optim.lr is reached: lower optim.warmup_samples"]


MEASURE = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from pipeline.schema import Batch
from trainer.accumulation import chunks, forward_backward
from trainer.checkpoint import make_model
from trainer.config_file import load_config
from trainer.distributed import ALONE
from trainer.objectives import Objective
from trainer.optim import make_optimizer
from trainer.parallel import Step

torch.set_num_threads(1)
config = load_config("scenes-tiny", sys.argv[1:])

def train(groups):
    tokenizer = SimpleNamespace(vocab_size=config.model.text.vocab_size, end_id=2)
    model = make_model(config, tokenizer).recompute(config.run.recompute)
    optimizer, size = make_optimizer(model, config.optim), config.model.image.size
    tokens = torch.zeros(groups, 1, config.model.text.context, dtype=torch.long)
    tokens[..., 6] = 2
    ids = torch.arange(groups)
    views = [torch.randn(groups, 3, size, size) for _ in range(3)]
    batch = Batch(views, torch.randn(groups, 3, 11), tokens, ids, ids, ids >= 0)
    for _ in range(2):
        optimizer.zero_grad()
        parts = chunks(config.optim.accumulation, batch.views, batch.vectors, batch.tokens)
        forward_backward(Step(model, config.run.precision == "bf16"), parts, Objective(config, ALONE).of(batch))
        optimizer.step()

def told(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

train(2)
before = told("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
train(config.optim.batch_size)
print((told("VmHWM") - before) * 1024)
"""


@pytest.mark.parametrize("more", [["optim.batch_size=64", "run.precision=bf16", "model.text.width=384"],
                                  ["optim.batch_size=96", "optim.accumulation=3", "run.recompute=true"]], ids=" ".join)
def test_modelled_memory_is_that_of_a_process_within_15_percent(more):
    """Its peak in two steps, with an allocator that gives back what is free."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *more], capture_output=True, text=True,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr
    memory = sizes_of(load_config("scenes-tiny", more)).memory
    modelled = sum(memory.values()) - memory["checkpoint"] - memory["batches"] * 3 // 4  # one batch here, four in a run
    assert modelled == pytest.approx(int(done.stdout), rel=0.15)


@pytest.mark.parametrize("dim, groups", [(64, 512), (512, 256)])
def test_modelled_memory_of_the_loss_is_that_of_its_tensors_within_15_percent(dim, groups):
    image, text = torch.randn(groups, 3, dim, requires_grad=True), torch.randn(groups, 1, dim, requires_grad=True)
    with Live([image, text]) as live:
        tiled_loss("mp_nce", image, text, torch.full((3,), 0.1), torch.zeros(3)).backward()
    of_run = load_config("scenes-tiny", [f"model.dim={dim}", f"optim.batch_size={groups}"])
    assert loss_bytes(of_run, groups) == pytest.approx(live.peak, rel=0.15)
