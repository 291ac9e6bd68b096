"""A step that is not finite is left out on all ranks, kept, and can be run again."""

import json
import re
import subprocess

import pytest
import torch
from conftest import command
from safetensors.torch import load_file
from short_runs import PROGRAM, TORCHRUN, begin, on_ranks, overrides, trace

from pipeline.console import InputError, WorkFailed
from pipeline.loader import Loader
from trainer import checkpoint
from trainer.config_file import load_config
from trainer.failures import replay
from trainer.hints import Hints
from trainer.train import train
from trainer.training import restored, snapshot, start


@pytest.fixture(scope="module")
def poisoned(scenes, tmp_path_factory):
    """A run of 48 samples whose next batch holds, on the second of two ranks alone, a word with an infinite embedding."""
    folder = tmp_path_factory.mktemp("runs") / "poisoned"
    t = start(load_config("scenes-tiny", overrides(scenes, folder)))
    loader, first, second = t.data.loader(t.tokenizer, t.recipe, t.cursor, 16), set(), set()
    assert isinstance(loader, Loader)
    at, batch = 48, loader.batch_at(48)
    while not second - first:
        at += 16
        batch = loader.batch_at(at)
        first, second = set(batch.tokens[:8].flatten().tolist()), set(batch.tokens[8:].flatten().tolist())
    loader.close()
    word = min(second - first)
    guilty = batch.sample_id[8:][(batch.tokens[8:] == word).flatten(1).any(1)].tolist()
    begin(scenes, folder, **{"optim.samples": at, "optim.skips": 20, "run.keep": 9})
    config, t = restored(folder)
    with torch.no_grad():
        t.model.text.token.weight[word] = torch.inf
    longer = config.model_copy(update={"optim": config.optim.model_copy(update={"samples": at + 48})})
    checkpoint.save(folder, snapshot(longer, t, 0.0), 9)
    return folder, at, guilty


def test_all_ranks_leave_the_update_out_and_the_replay_finds_the_samples(poisoned):
    folder, at, guilty = poisoned
    before = load_file(checkpoint.find(folder) / checkpoint.WEIGHTS)
    on_ranks(2, ["resume", str(folder)])
    kept = folder / "failures" / f"{at:012d}"
    met = load_file(kept / checkpoint.WEIGHTS)
    assert all(torch.equal(met[name], before[name]) for name in before)
    after = checkpoint.read_state(checkpoint.find(folder))
    assert after.skipped == 3 - sum(1 for row in trace(folder) if row[1] > at) > 0
    assert all(torch.isfinite(torch.tensor(row[2])) for row in trace(folder))
    if after.skipped == 3:  # every batch had the word: no update at all
        last = load_file(checkpoint.find(folder) / checkpoint.WEIGHTS)
        assert all(torch.equal(last[name], before[name]) for name in before)
    assert sorted(p.name for p in kept.glob("rank*")) == ["rank0.safetensors", "rank1.safetensors"]
    done = command("uniclip-train", "replay", kept)
    assert done.returncode == 0, done.stderr
    assert f"at {at} samples: loss nan" in done.stdout
    assert "gradient norm of text: nan" in done.stdout
    told = re.search(r"text embeddings that are not finite: (\d+), of samples ([\d, ]+)", done.stdout)
    assert told and sorted(map(int, told[2].split(", "))) == sorted(guilty) and int(told[1]) == len(guilty)
    assert "image embeddings that are not finite: 0\n" in done.stdout
    assert "weights that are not finite: text.token.weight" in done.stdout
    ranks = command(*TORCHRUN, "2", "--no-python", PROGRAM, "replay", kept)  # one voice, which speaks for all
    assert ranks.returncode == 0, ranks.stderr
    both = [re.search(r"text embeddings that are not finite.*", out) for out in (done.stdout, ranks.stdout)]
    assert both[0] and both[1] and both[0][0] == both[1][0]
    assert len(ranks.stdout.splitlines()) == len(done.stdout.splitlines())


def test_a_replay_looks_where_the_data_of_its_run_is_now(poisoned, scenes, tmp_path):
    folder, at, _ = poisoned
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace(str(scenes / "train"), str(tmp_path / "gone")))
    with pytest.raises(InputError, match=str(tmp_path / "gone")):
        replay(folder / "failures" / f"{at:012d}")
    (folder / "config.toml").write_text(text)


def test_a_replay_of_other_data_or_of_nothing_is_refused(poisoned, tmp_path):
    with pytest.raises(InputError, match="holds no step to replay"):
        replay(tmp_path)


def test_past_the_budget_the_run_ends(poisoned):
    folder, at, _ = poisoned
    config, t = restored(folder / "checkpoints" / f"{at:012d}")
    strict = config.model_copy(update={"optim": config.optim.model_copy(update={"skips": 0})})
    later = [folder / "failures" / f"{at + n:012d}" for n in (100, 200, 300)]  # of a run that then went back
    for step in later:
        step.mkdir()
    with pytest.raises(WorkFailed, match=r"not finite, the 1. such step, more than optim.skips = 0.*uniclip-train replay"):
        train(strict, t)
    assert (folder / "failures" / f"{at:012d}" / "rank0.safetensors").is_file()
    assert not later[0].exists() and later[1].exists() and later[2].exists()


@pytest.fixture
def small_disk(tmp_path):
    """Mount a full file system of 256 KiB at a folder."""
    folder = tmp_path / "run" / "failures"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_step_that_finds_no_room_is_told_and_the_run_goes_on(scenes, tmp_path, small_disk):
    folder = tmp_path / "run"
    begin(scenes, folder, **{"optim.samples": 32})
    config, t = restored(folder)
    with torch.no_grad():
        t.model.text.token.weight.fill_(torch.nan)
    longer = config.model_copy(update={"optim": config.optim.model_copy(update={"samples": 64})})
    checkpoint.save(folder, snapshot(longer, t, 0.0), 9)
    done = command(*TORCHRUN, "2", "--no-python", PROGRAM, "resume", folder)
    assert done.returncode == 0, done.stderr
    (told, _) = re.findall(r"left out an update: .*", done.stdout)
    assert f"it cannot be run again: {small_disk}/000000000032 could not be written" in told
    assert "No space left on device" in told
    needed = float(re.search(r"a step needs ([\d.]+) MiB, make room there", told)[1])  # type: ignore[index]
    assert needed * 2**20 == pytest.approx((checkpoint.find(folder) / checkpoint.WEIGHTS).stat().st_size, rel=0.1)
    assert checkpoint.read_state(checkpoint.find(folder)).skipped == 2
    assert not list(small_disk.iterdir())


HEALTHY = {"step": 90, "samples": 900, "loss": 1.0, "floor_loss": 0.1, "chance_loss": 4.0, "data_wait": 0.0,
           "temperature": [0.05, 0.05, 0.05], "duplicates": 0.0, "effective_rank_image": 40.0, "effective_rank_text": 40.0}
ILL = [({"data_wait": 0.5}, "waits for data 40%"), ({"loss": 3.95}, "random embeddings"),
       ({"effective_rank_text": 1.2}, "text embeddings have collapsed"), ({"temperature": [0.05, 0.01, 0.05]}, "floor"),
       ({"duplicates": 0.2}, "twin")]


@pytest.mark.parametrize("symptom, message", ILL, ids=[message for _, message in ILL])
def test_each_illness_is_told_once(symptom, message):
    hints = Hints(1000)
    assert hints.of(HEALTHY) == []
    (told,) = [line for _ in range(6) for line in hints.of(HEALTHY | symptom)]
    assert message in told


def test_a_spike_is_told_and_a_steady_descent_is_not():
    hints = Hints(10_000)
    for step in range(60):
        assert hints.of(HEALTHY | {"loss": 2.0 - step / 100 + 0.05 * (-1) ** step}) == []
    (told,) = hints.of(HEALTHY | {"loss": 3.5})
    assert "spike" in told


def test_the_log_carries_what_a_person_asks_for(scenes, tmp_path):
    begin(scenes, tmp_path / "run", **{"optim.samples": 48})
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["grad_norms"].keys() == {"image", "text", "augmentation", "image_head", "text_head", "similarity"}
    squares = sum(norm ** 2 for norm in last["grad_norms"].values())
    assert squares ** 0.5 == pytest.approx(last["grad_norm"], rel=1e-5)
    assert last["floor_loss"] < last["loss"] < 1.5 * last["chance_loss"]
    assert last["views_per_second"] == pytest.approx(3 * last["samples_per_second"])
    assert last["skipped"] == last["bad_samples"] == 0
    assert 0 < last["memory_gib"] < 24 and last["tflops"] > 0
    assert len(last["positive_logit"]) == 3 and 1 <= last["effective_rank_image"] <= 16


def test_wandb_gets_every_number_and_one_run_after_a_resume(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    begin(scenes, folder, **{"optim.samples": 48, "run.wandb": "uniclip"})
    config, t = restored(folder)
    train(config.model_copy(update={"optim": config.optim.model_copy(update={"samples": 64})}), t)
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({run.name.rpartition("-")[2] for run in runs}) == 1
    logged = b"".join(path.read_bytes() for path in runs[0].glob("*.wandb"))
    for name in (b"grad_norms/image_head", b"temperature/image-text", b"floor_loss"):
        assert name in logged
