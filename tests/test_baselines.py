"""Whole runs of CLIP, SLIP and DeCLIP: they learn, go on after a kill, run on several processes, and can be evaluated."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import command
from short_runs import begin, launch, on_ranks, overrides, run_until, weights

from pipeline.console import InputError
from trainer import checkpoint
from trainer.config_file import load_config
from trainer.embedder import Embedder
from trainer.export import export
from trainer.train import train
from trainer.training import restored, start

SHORT = {"optim.samples": 320, "objective.hidden": 32, "objective.queue": 100, "data.executor": "pillow"}


@pytest.fixture(scope="module")
def declip(scenes, tmp_path_factory):
    """An uninterrupted run with a held-out loss on the way."""
    folder = tmp_path_factory.mktemp("runs") / "declip"
    begin(scenes, folder, **SHORT, **{"objective.name": "declip", "eval.held_out": scenes / "train",
                                      "eval.every_samples": 160})
    return folder


def logged(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_declip_killed_and_resumed_equals_never_stopped(scenes, tmp_path, declip):
    killed = tmp_path / "killed"
    words = overrides(scenes, killed, **SHORT, **{"objective.name": "declip"})
    assert run_until(launch(1, ["run", "scenes-tiny", *(w for o in words for w in ("--set", o))]), killed, 8)
    train(*restored(killed))
    assert [(m["loss"], m["terms"]) for m in logged(killed)] == [(m["loss"], m["terms"]) for m in logged(declip)]
    assert weights(killed) == weights(declip)
    mine, theirs = (checkpoint.read_tensors(checkpoint.find(folder)).memory for folder in (killed, declip))
    assert {name: tuple(x.shape) for name, x in mine.items()} == {"auxiliary.queue.text_QD": (100, 16),
                                                                  "auxiliary.queue.pushed": ()}
    assert int(mine["auxiliary.queue.pushed"]) == 320
    assert all(torch.equal(x, theirs[name]) for name, x in mine.items())


def test_the_queue_matters_to_what_comes_after(tmp_path, declip):
    """Or the test above would prove nothing: with another queue the losses are others."""
    other = shutil.copytree(declip, tmp_path / "other")
    config, t = restored(other / "checkpoints" / "000000000288")
    before = dict(t.model.named_buffers())
    assert before["auxiliary.queue.pushed"].item() == 288
    before["auxiliary.queue.text_QD"].copy_(torch.eye(100, 16))
    train(config, t)
    assert logged(other)[18]["terms"]["neighbour"] != logged(declip)[18]["terms"]["neighbour"]


@pytest.mark.parametrize("name", ["slip", "declip"])
def test_two_processes_with_accumulation_train_as_one(scenes, tmp_path, declip, name):
    one, two = tmp_path / "one", tmp_path / "two"
    more = SHORT | {"objective.name": name, "optim.samples": 96}
    begin(scenes, one, **more)
    words = overrides(scenes, two, **more, **{"optim.accumulation": 2})
    on_ranks(2, ["run", "scenes-tiny", *(w for o in words for w in ("--set", o))])
    assert [m["loss"] for m in logged(two)] == pytest.approx([m["loss"] for m in logged(one)], rel=1e-4)
    assert [m["grad_norm"] for m in logged(two)] == pytest.approx([m["grad_norm"] for m in logged(one)], rel=1e-3)


@pytest.mark.parametrize("name", ["clip", "slip", "declip"])
def test_baselines_learn_and_are_evaluated_and_exported(scenes, tmp_path, declip, name):
    folder = declip
    if name != "declip":
        begin(scenes, folder := tmp_path / name, **SHORT, **{"objective.name": name, "optim.average_samples": 64})
    told = logged(folder)
    assert np.mean([m["loss"] for m in told[-4:]]) < np.mean([m["loss"] for m in told[:4]]) - 0.05
    assert told[-1]["floor_loss"] < told[-1]["loss"] < told[0]["chance_loss"] + 1
    done = command("uniclip-eval", "retrieval", folder, scenes / "evalsets" / "retrieval", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "image_to_text_recall@1" in (folder / "results.jsonl").read_text()
    export(folder, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"objective {name}" in card
    one, other = Embedder(folder), Embedder(tmp_path / "export")
    assert torch.equal(one.encode_text("a red circle"), other.encode_text("a red circle"))


def test_the_held_out_loss_is_the_objective_and_leaves_the_queue_alone(declip):
    lines = [json.loads(line) for line in (declip / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/held_out_loss"] for line in lines if "eval/held_out_loss" in line]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0] + 0.1
    assert abs(held_out[1] - logged(declip)[-1]["loss"]) < 1.0


def test_other_synonyms_are_other_data(scenes, tmp_path):
    table = tmp_path / "synonyms.tsv"
    table.write_text("red\tcrimson\n")
    more = SHORT | {"objective.name": "declip", "objective.synonyms": table, "optim.samples": 32}
    begin(scenes, tmp_path / "run", **more)
    table.write_text("red\tscarlet\n")
    with pytest.raises(InputError, match="'data'"):
        restored(tmp_path / "run")


def test_a_batch_of_declip_holds_three_texts(scenes, tmp_path):
    config = load_config("scenes-tiny", overrides(scenes, tmp_path / "run", **SHORT, **{"objective.name": "declip"}))
    t = start(config)
    loader = t.data.loader(t.tokenizer, t.recipe, t.cursor, 16)
    first, second = loader.batch_at(0), loader.batch_at(0)
    loader.close()
    assert first.tokens.shape == (16, 3, config.model.text.context)
    assert torch.equal(first.tokens, second.tokens)
    assert (first.tokens[:, :2] >= 0).all()
    assert (first.tokens[:, 2] < 0).any()
    assert not torch.equal(first.tokens[:, 0], first.tokens[:, 1])
