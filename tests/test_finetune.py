"""Fine-tuning: stopped and begun again it is the run that was never stopped, and its layers learn at their own rates."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import encoded, picture
from PIL import Image
from test_cache import stub
from tiny import tiny_run

from evaluation import finetune as module
from evaluation.evaluate import Bench
from evaluation.finetune import STATE, Recipe, finetune
from evaluation.subject import Subject, checkpoint_subject
from pipeline.console import InputError
from pipeline.evalsets import write_evalset

RECIPE = Recipe(epochs=3, batch_size=8, lr=3e-3, mixup=0.1, cutmix=0.1, augment="rand-m5-mstd0.5-inc1", erasing=0.1)


@pytest.fixture(scope="module")
def subject(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return checkpoint_subject(tiny_run(scenes, tmp_path_factory.mktemp("tuned") / "run"), "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Bright and dark pictures."""
    def examples(seed: int, n: int):
        return [(encoded(Image.blend(picture(seed + i), Image.new("RGB", (80, 60), ("black", "white")[i % 2]), 0.7)), i % 2)
                for i in range(n)]

    for split, seed, n in (("train", 0, 24), ("validation", 100, 8), ("test", 200, 16)):
        write_evalset(tmp_path / "set", split, examples(seed, n), "classification", ["dark", "bright"])
    return tmp_path / "set"


def test_it_learns_leaves_the_model_alone_and_is_measured_once(subject: Subject, folder: Path, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(epochs=15, batch_size=8, lr=3e-3, layer_decay=1.0, mixup=0, cutmix=0, augment="", erasing=0)
    before = [p.clone() for p in subject.model.parameters()]
    bench = Bench.of(subject, tmp_path / "out/results.jsonl")
    rows = finetune(bench, folder, recipe)
    assert rows[0]["metric"] == "accuracy" and rows[0]["value"] > 0.8 and rows[0]["n"] == 16
    assert "layer_decay 1.0" in rows[0]["protocol"] and rows[0]["details"]["train_images"] == 32
    assert all(torch.equal(a, b) for a, b in zip(before, subject.model.parameters(), strict=True))
    assert [row["value"] for row in finetune(bench, folder, recipe)] == [row["value"] for row in rows]
    assert "finetune: finished on" in capsys.readouterr().out


def test_stopped_and_begun_again_it_ends_as_if_never_stopped(subject: Subject, folder: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(out: Path) -> dict[str, torch.Tensor]:
        state, = out.rglob(STATE)
        return torch.load(state, weights_only=True)["model"]

    whole = finetune(Bench.of(subject, tmp_path / "whole/r.jsonl"), folder, RECIPE)
    save, epochs = module._save, []

    def stopping(scratch: Path, model, optimizer, done: int) -> None:
        save(scratch, model, optimizer, done)
        epochs.append(done)
        if len(epochs) in (1, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_save", stopping)
    stopped = Bench.of(subject, tmp_path / "stopped/r.jsonl")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            finetune(stopped, folder, RECIPE)
        torch.rand(7)  # whatever else was drawn in the meantime
    rows = finetune(stopped, folder, RECIPE)
    assert epochs == [1, 2, 3] and rows[0]["value"] == whole[0]["value"]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("end", [None, 60])
def test_a_state_of_an_older_version_without_checksum_is_taken_and_half_of_one_named(tmp_path: Path, end: int | None) -> None:
    model: Any = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": 3}, file)
    (tmp_path / STATE).write_bytes(file.getvalue()[:end])
    if end is None:
        assert module._resumed(tmp_path, model, optimizer) == 3
    else:
        with pytest.raises(InputError, match="state.pt is damaged"):
            module._resumed(tmp_path, model, optimizer)


def test_rates_fall_with_depth_and_follow_the_schedule(subject: Subject) -> None:
    model = module._classifier(subject, 5)
    assert not model.head.weight.any() and model.head.out_features == 5  # type: ignore[union-attr,operator]
    optimizer = module.create_optimizer_v2(model, "adamw", 1.0, 0.05, layer_decay=0.5)
    module._set_rate(optimizer, Recipe(lr=1.0), 0.1)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    stem, block = rate[id(model.patch_embed.proj.weight)], rate[id(model.blocks[0].attn.qkv.weight)]  # type: ignore[union-attr]
    assert rate[id(model.head.weight)] == pytest.approx(1.0) and stem == pytest.approx(block / 2) and block < 1
    for done, share in ((0.0, 0.0), (0.05, 0.5), (0.55, 0.5), (1.0, 0.0)):
        module._set_rate(optimizer, Recipe(lr=1.0), done)
        assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(share, abs=1e-9)


def test_validation_is_measured_without_being_trained_on_and_exports_will_do(subject: Subject, folder: Path,
                                                                            tmp_path: Path) -> None:
    from trainer.export import export

    export(subject.home, tmp_path / "export")
    exported = checkpoint_subject(tmp_path / "export", "cpu")
    rows = [finetune(Bench.of(model, tmp_path / f"{i}/r.jsonl"), folder, RECIPE, "validation")
            for i, model in enumerate((subject, exported))]
    assert rows[0][0]["split"] == "validation" and rows[0][0]["n"] == 8 and rows[0][0]["details"]["train_images"] == 24
    assert [row["value"] for row in rows[0]] == [row["value"] for row in rows[1]]
    with pytest.raises(InputError, match="cannot be fine-tuned: only runs, checkpoints and exports"):
        finetune(Bench.of(stub(), tmp_path / "r.jsonl"), folder, RECIPE)


def test_sets_without_a_train_split_or_labels_are_named(subject: Subject, tmp_path: Path) -> None:
    write_evalset(tmp_path / "one", "test", [(encoded(picture(1)), 0)], "classification")
    with pytest.raises(InputError, match="one cannot be fine-tuned on: it needs labels and a split 'train'"):
        finetune(Bench.of(subject, tmp_path / "r.jsonl"), tmp_path / "one", RECIPE)


@pytest.mark.parametrize("wrong", [
    {"lr": math.nan}, {"lr": -1.0}, {"mixup": -1.0}, {"smallest_crop": 0.0}, {"smallest_crop": 2.0}, {"layer_decay": 0.0},
    {"erasing": 2.0}, {"seed": -1}, {"augment": "bogus"}])
def test_a_recipe_that_cannot_be_trained_is_refused_by_its_option(wrong: dict) -> None:
    name, = wrong
    with pytest.raises(InputError, match=f"^--{name.replace('_', '-')} .*give"):
        Recipe(**wrong)
