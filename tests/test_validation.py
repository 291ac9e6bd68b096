"""Evaluation during training: exact on any number of ranks, equal to `uniclip-eval`, and training never notices."""

import json
import shutil
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command
from short_runs import begin, launch, on_ranks, overrides, run_until, weights
from worlds import World

from evaluation.evaluate import Bench, evaluate
from evaluation.subject import checkpoint_subject
from pipeline.console import InputError
from pipeline.index import Index
from pipeline.loader import Indexed, Loader
from pipeline.recipe import Cursor
from trainer.config_file import load_config
from trainer.distributed import Ranks
from trainer.log import Log
from trainer.losses import LOSSES
from trainer.orders import Orders
from trainer.parallel import Step
from trainer.train import train
from trainer.training import Training, restored, start
from trainer.validation import Examined, Validation

SETS = ("retrieval", "colour")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """An index of 33 other scenes: two batches of 16 and one of 1."""
    folder = tmp_path_factory.mktemp("held_out") / "set"
    for words in (("scenes", folder, "--count", "33", "--held-out", "2", "--format", "wds", "--seed", "5"),
                  ("index", folder / "train")):
        done = command("uniclip-data", *words)
        assert done.returncode == 0, done.stderr
    return folder / "train"


def wanted(scenes: Path, held_out: Path, **more) -> dict:
    """[eval] with two sets and a held-out index, in small batches."""
    return {"eval.every_samples": 100, "eval.held_out": held_out, "eval.batch_size": 5,
            "eval.sets": json.dumps([str(scenes / "evalsets" / name) for name in SETS]), **more}


def lines(folder: Path) -> tuple[list[list], list[dict]]:
    """Of metrics.jsonl what is a matter of training alone, and the evaluations without their seconds."""
    every = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [[m[name] for name in ("step", "samples", "loss", "grad_norm", "temperature")] for m in every if "loss" in m]
    return steps, [{name: x for name, x in m.items() if name not in {"eval/seconds", "crc32"}}
                   for m in every if "loss" not in m]


AVERAGED = {"optim.samples": 240, "optim.average_samples": 64, "data.executor": "pillow"}


@pytest.fixture(scope="module")
def finished(scenes, held_out, tmp_path_factory) -> Path:
    """A run that was evaluated at 112, 208 and 240 samples."""
    return begin_evaluated(scenes, held_out, tmp_path_factory.mktemp("runs") / "evaluated", **AVERAGED)


def begin_evaluated(scenes: Path, held_out: Path, folder: Path, **more) -> Path:
    begin(scenes, folder, **wanted(scenes, held_out, **more))
    return folder


def test_the_numbers_are_those_of_uniclip_eval(scenes, held_out, tmp_path):
    """At its own batch size, on the same checkpoint; the average is what both evaluate."""
    folder = begin_evaluated(scenes, held_out, tmp_path / "run", **AVERAGED | {"eval.batch_size": 64})
    bench = Bench.of(checkpoint_subject(folder, "cpu"), tmp_path / "results.jsonl")
    rows = [("retrieval", evaluate("retrieval", bench, [scenes / "evalsets/retrieval"])),
            ("colour", evaluate("zeroshot", bench, [scenes / "evalsets/colour"]))]
    expected = {f"eval/{name}/{row['metric']}": row["value"] for name, found in rows for row in found
                if row["metric"] != "mean_per_class_recall"}
    found = lines(folder)[1][-1]
    assert {name: found[name] for name in found if name not in ("samples", "eval/held_out_loss")} == pytest.approx(
        expected, abs=1e-6)
    assert found["samples"] == 240


def test_training_does_not_notice(scenes, finished, tmp_path):
    begin(scenes, tmp_path / "bare", **AVERAGED)
    steps, evaluations = lines(finished)
    assert lines(tmp_path / "bare") == (steps, [])
    assert weights(tmp_path / "bare") == weights(finished)
    assert [m["samples"] for m in evaluations] == [112, 208, 240]
    assert len({m["eval/held_out_loss"] for m in evaluations}) == 3


def test_killed_and_resumed_it_evaluates_as_if_never_stopped(scenes, held_out, finished, tmp_path):
    folder = tmp_path / "killed"
    words = overrides(scenes, folder, **wanted(scenes, held_out), **AVERAGED)
    assert run_until(launch(1, ["run", "scenes-tiny", *(w for o in words for w in ("--set", o))]), folder, 9)
    done = command("uniclip-train", "resume", folder)
    assert done.returncode == 0, done.stderr
    assert lines(folder) == lines(finished)
    assert weights(folder) == weights(finished)


class DuringEvaluation(Orders):
    """An order to stop that comes in the middle of an evaluation."""

    def __init__(self, t: Training, samples: int) -> None:
        self.left, self.samples, self.t = 4, samples, t
        super().__init__()

    @property
    def stop(self) -> bool:
        if self.t.cursor.samples_seen == self.samples:
            self.left -= 1
        return self.left <= 0

    @stop.setter
    def stop(self, _: bool) -> None:
        """It is a matter of how often one asks."""


def test_stopped_in_an_evaluation_the_run_saves_and_makes_up_for_it(scenes, held_out, finished, tmp_path):
    folder = tmp_path / "stopped"
    config = load_config("scenes-tiny", overrides(scenes, folder, **wanted(scenes, held_out), **AVERAGED))
    t = start(config)
    train(config, t, DuringEvaluation(t, 112))
    assert [m["samples"] for m in lines(folder)[1]] == []
    config, t = restored(folder)
    assert t.cursor.samples_seen == 112
    train(config, t)
    assert lines(folder) == lines(finished)
    assert weights(folder) == weights(finished)


class Told(Examined):
    """A set whose numbers say its embeddings to the bit."""

    def metrics(self, image_ND: torch.Tensor, text_TD: torch.Tensor) -> dict[str, float]:
        told = {"images": zlib.crc32(image_ND.numpy().tobytes()), "texts": zlib.crc32(text_TD.numpy().tobytes())}
        return super().metrics(image_ND, text_TD) | told


def measured(rank: int, world: int, words: list[str], folder: Path) -> dict:
    """What a fresh model's evaluation says, of one process in a world."""
    config, ranks = load_config("scenes-tiny", [*words, f"run.folder={folder}"]), Ranks(rank, world, 16)
    t = start(config, "cpu", ranks)
    t.cursor = replace(t.cursor, samples_seen=112)
    folder.mkdir(parents=True, exist_ok=True)
    ranks.wait()
    log = Log(config.run, 240, 112) if rank == 0 else None
    before = torch.get_rng_state()
    validation = Validation(config, t, Orders())
    validation.sets = tuple(Told(**vars(one)) for one in validation.sets)
    validation.evaluate(log)
    assert torch.equal(torch.get_rng_state(), before)
    assert t.model.training
    if log:
        log.close()
    ranks.wait()
    return lines(folder)[1][0]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Two processes, and three."""
    made = [World(size, tmp_path_factory.mktemp("world") / "rendezvous") for size in (2, 3)]
    yield made
    for world in made:
        world.close()


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_numbers_are_equal_to_the_bit_on_any_number_of_ranks(scenes, held_out, worlds, tmp_path, sharding):
    """The held-out loss to rounding: each rank's slice goes through the towers as one matrix, as in training."""
    words = overrides(scenes, tmp_path / "run", **wanted(scenes, held_out), **AVERAGED,
                      **{"optim.accumulation": 2, "run.sharding": sharding})
    every = [measured(0, 1, words, tmp_path / "alone"),
             *(world.run(measured, words, tmp_path / str(world.size))[0] for world in worlds)]
    losses = [m.pop("eval/held_out_loss") for m in every]
    assert every[0] == every[1] == every[2]
    assert len(every[0]) == 1 + 6 + 2 + 4  # samples, recalls, accuracies, embeddings
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


def test_training_on_ranks_does_not_notice_either(scenes, held_out, tmp_path):
    """Sharded, averaged, in bf16, in parts."""
    more = {**AVERAGED, "optim.samples": 160, "optim.accumulation": 2, "run.sharding": "fsdp", "run.precision": "bf16"}
    found = []
    for name, of_eval in (("bare", {}), ("evaluated", wanted(scenes, held_out))):
        words = overrides(scenes, tmp_path / name, **more, **of_eval)
        on_ranks(2, ["run", "scenes-tiny", *(w for o in words for w in ("--set", o))])
        found.append((lines(tmp_path / name)[0], weights(tmp_path / name)))
    assert found[0] == found[1]
    assert [m["samples"] for m in lines(tmp_path / "evaluated")[1]] == [112, 160]


def test_the_held_out_loss_by_hand(scenes, held_out, tmp_path):
    """The mean over samples of the dense loss of their batch, the last batch of one sample included."""
    words = overrides(scenes, tmp_path / "run", **wanted(scenes, held_out), **AVERAGED)
    config, found = load_config("scenes-tiny", words), measured(0, 1, words, tmp_path / "run")
    t, index, total = start(config), Index.open(held_out), 0.0
    for position, size in ((0, 16), (16, 16), (32, 1)):
        loader = Loader(index, t.tokenizer, t.recipe, Cursor(0, 0, index.fingerprint, ""), size)
        batch = loader.batch_at(position)
        loader.close()
        with torch.no_grad():
            outputs = Step(t.model.eval())(batch.views, batch.vectors, batch.tokens)
            total += size * LOSSES[config.loss.name](*outputs, group_id=batch.group_id).item()
    assert found["eval/held_out_loss"] == pytest.approx(total / 33, rel=1e-5)


def test_a_part_of_a_set_is_exact_and_evenly_spaced(scenes, tmp_path):
    config = load_config("scenes-tiny", overrides(scenes, tmp_path / "run", **{"eval.samples": 7}))
    t, folder = start(config), scenes / "evalsets/colour"
    whole = Examined.open(folder, config.eval.model_copy(update={"samples": 0}), t)
    part = Examined.open(folder, config.eval, t)
    assert (len(whole.targets), len(part.targets), part.used_N.sum()) == (24, 7, 7)
    assert {*np.diff(np.flatnonzero(part.used_N)).tolist()} == {3, 4}
    assert part.targets == [target for target, used in zip(whole.targets, part.used_N, strict=True) if used]


def test_a_set_that_breaks_costs_its_numbers_and_not_the_run(scenes, tmp_path, capsys):
    folder = tmp_path / "broken"
    shutil.copytree(scenes / "evalsets/retrieval", folder)
    tar = folder / "test/0.tar"
    with tarfile.open(tar) as opened:
        at = next(m.offset_data for m in opened if not m.name.endswith(".txt"))
    data = bytearray(tar.read_bytes())
    data[at:at + 8] = bytes(8)
    tar.write_bytes(data)
    begin(scenes, tmp_path / "run", **AVERAGED | {"optim.samples": 64, "eval.every_samples": 64, "eval.sets": json.dumps(
        [str(folder), str(scenes / "evalsets/colour")])})
    assert "no numbers of broken this time: image s0000000 cannot be decoded" in capsys.readouterr().out
    (found,) = lines(tmp_path / "run")[1]
    assert {name.split("/")[1] for name in found if "/" in name} == {"colour"}


WRONG = [
    ({"eval.sets": '["nowhere"]'}, "nowhere does not exist"),
    ({"eval.split": "dev"}, "has no split 'dev'; splits present: test"),
    ({"eval.held_out": "nowhere"}, "index.arrow does not exist: run `uniclip-data index"),
    ({"eval.sets": "TWICE"}, "two folders named retrieval"),
    ({"eval.sets": "EMPTY"}, "has no examples in its split 'test'"),
    ({"eval.sets": "[]"}, "asks for an evaluation of nothing: set eval.held_out or eval.sets too"),
]


@pytest.mark.parametrize("more, message", WRONG, ids=lambda x: str(x)[:30])
def test_wrong_input_is_one_clear_line_before_training_starts(scenes, tmp_path, more, message):
    retrieval = str(scenes / "evalsets/retrieval")
    other = tmp_path / "other/retrieval"
    shutil.copytree(retrieval, other)
    values = {"eval.every_samples": 64, "eval.sets": json.dumps([retrieval]), **more}
    if values["eval.sets"] == "TWICE":
        values["eval.sets"] = json.dumps([retrieval, str(other)])
    if values["eval.sets"] == "EMPTY":
        tarfile.open(other / "test/0.tar", "w").close()
        values["eval.sets"] = json.dumps([str(other)])
    with pytest.raises(InputError, match=message) as error:
        begin(scenes, tmp_path / "run", **values)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_held_out_samples_that_are_trained_on_are_counted(scenes, tmp_path, capsys):
    """Here all of them, and none once a skip list leaves them out."""
    config = load_config("scenes-tiny", overrides(scenes, tmp_path / "run", **{
        "eval.every_samples": 64, "eval.held_out": scenes / "train"}))
    t = start(config)
    assert isinstance(t.data, Indexed)
    Validation(config, t, Orders())
    count = len(t.data.index)
    assert f"warning: {count} of {count} held-out samples are trained on too" in capsys.readouterr().out
    t.data = replace(t.data, plan=replace(t.data.plan, skipped=np.arange(count)))
    Validation(config, t, Orders())
    assert "warning" not in capsys.readouterr().out
