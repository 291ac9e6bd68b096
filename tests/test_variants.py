"""Other ways to run the same mathematics: sharded, recomputed, compiled, averaged, with rates by part and depth."""

import math

import pytest
import torch
from conftest import command
from safetensors.torch import load_file
from short_runs import begin, losses, on_ranks, overrides, trace, weights

from trainer import checkpoint
from trainer.config import OptimConfig
from trainer.config_file import load_config
from trainer.flops import flops_per_sample
from trainer.memory import sizes_of
from trainer.optim import parameter_groups
from trainer.train import train
from trainer.training import restored, start

SHORT = {"optim.samples": 160}


@pytest.fixture(scope="module")
def plain(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    begin(scenes, folder, **SHORT)
    return folder


def words(scenes, folder, **more) -> list[str]:
    return ["run", "scenes-tiny", *(w for o in overrides(scenes, folder, **more) for w in ("--set", o))]


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.find(folder) / checkpoint.WEIGHTS)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sharded_over_two_processes_trains_the_same_model(scenes, tmp_path, plain, accumulation):
    """FSDP2, stopped after 80 samples, on to the end unsharded on one process: the checkpoint is the same thing."""
    folder = tmp_path / "sharded"
    more = SHORT | {"run.sharding": "fsdp", "optim.accumulation": accumulation, "optim.average_samples": 64}
    on_ranks(2, words(scenes, folder, **more))
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-5)
    on_ranks(2, ["resume", str(folder / "checkpoints" / "000000000144")])
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-5)
    again = command("uniclip-train", "resume", folder / "checkpoints" / "000000000144")
    assert again.returncode == 0, again.stderr
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-5)
    for name, expected in tensors(plain).items():
        torch.testing.assert_close(tensors(folder)[name], expected, rtol=1e-3, atol=1e-5)


def test_sharded_processes_with_unequal_shares_take_equally_many_parts(scenes, tmp_path):
    more = {"optim.batch_size": 5, "optim.samples": 10, "optim.accumulation": 3}
    begin(scenes, tmp_path / "alone", **more)
    on_ranks(2, words(scenes, tmp_path / "sharded", **more, **{"run.sharding": "fsdp"}))
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_recomputed_activations_change_nothing(scenes, tmp_path, plain):
    begin(scenes, tmp_path / "run", **SHORT, **{"run.recompute": "true"})
    assert trace(tmp_path / "run") == trace(plain)
    assert weights(tmp_path / "run") == weights(plain)


@pytest.mark.slow
def test_compiled_towers_train_the_same_model(scenes, tmp_path, plain):
    begin(scenes, tmp_path / "run", **SHORT, **{"run.compile": "true"})
    assert losses(tmp_path / "run") == pytest.approx(losses(plain), rel=1e-4)


def test_the_average_is_the_recurrence_and_is_what_evaluation_loads(scenes, tmp_path):
    folder = tmp_path / "run"
    begin(scenes, folder, **{"optim.samples": 64, "optim.average_samples": 100, "run.save_every_samples": 16, "run.keep": 9})
    steps = [tensors(folder / "checkpoints" / f"{16 * n:012d}") for n in range(5)]
    share, expected = 1 - math.exp(-16 / 100), steps[0]
    for step in steps[1:]:
        expected = {name: x + share * (step[name] - x) for name, x in expected.items()}
    loaded, last = checkpoint.load_model(folder), checkpoint.load_model(folder, average=False)
    for name, x in loaded.model.state_dict().items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-7)
    assert loaded.weights_sha256 != last.weights_sha256
    config, t = restored(folder / "checkpoints" / f"{32:012d}")
    train(config, t)
    again = checkpoint.load_model(folder)
    assert again.weights_sha256 == loaded.weights_sha256
    assert t.average
    with t.average.in_place():
        assert torch.equal(t.model.text_head.weight, again.model.text_head.weight)
    assert torch.equal(t.model.text_head.weight, last.model.text_head.weight)


def test_rates_by_part_and_depth(scenes, tmp_path):
    config = load_config("scenes-tiny", overrides(scenes, tmp_path))
    model = start(config).model
    optim = OptimConfig(samples=1, batch_size=2, lr=0.1, layer_decay=0.5, lr_scale={"text": 0.1, "similarity": 3.0})
    rates = {id(p): group["lr"] for group in parameter_groups(model, optim) for p in group["params"]}
    of = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(of)
    assert of["image.vit.blocks.1.mlp.fc1.weight"] == pytest.approx(0.1)
    assert of["image.vit.blocks.0.mlp.fc1.bias"] == pytest.approx(0.05)
    assert of["image.vit.patch_embed.proj.weight"] == of["image.vit.cls_token"] == pytest.approx(0.025)
    assert of["image.vit.norm.weight"] == of["image_head.project.weight" if "image_head.project.weight" in of
                                             else next(n for n in of if n.startswith("image_head"))] == pytest.approx(0.1)
    assert of["text.blocks.0.norm1.weight"] == pytest.approx(0.005)
    assert of["text.token.weight"] == of["text.position"] == pytest.approx(0.0025)
    assert of["similarity.log_temperature"] == pytest.approx(0.3)


def test_a_part_with_rate_zero_stays_and_the_rest_learns(scenes, tmp_path, plain):
    begin(scenes, tmp_path / "run", **SHORT, **{"optim.lr_scale": "{text = 0.0}"})
    first, last = (tensors(tmp_path / "run" / "checkpoints" / name) for name in ("000000000144", "000000000160"))
    fresh = start(load_config("scenes-tiny", overrides(scenes, tmp_path / "fresh", **SHORT))).model.state_dict()
    assert torch.equal(last["text.token.weight"], fresh["text.token.weight"])
    assert not torch.equal(last["image.vit.cls_token"], first["image.vit.cls_token"])


@pytest.mark.parametrize("name, views, texts", [("uniclip", 3, 1), ("clip", 1, 1), ("slip", 3, 1), ("declip", 2, 3)])
def test_flops_are_those_counted_by_hand(scenes, tmp_path, name, views, texts):
    config = load_config("scenes-tiny", overrides(scenes, tmp_path, **{
        "objective.name": name, "objective.hidden": 64, "model.head.augmentation_width": 48}))
    model = start(config).model
    patch, length = model.image.vit.patch_embed.patch_size[0], model.text.position.shape[0]
    patches, width, dim, batch, seen = (24 // patch) ** 2, 32, 16, 16, 48

    def tower(tokens: int) -> int:
        return 2 * (2 * tokens * 12 * width ** 2 + 2 * 2 * tokens * tokens * width)  # two blocks, mlp of four widths

    image, text = tower(patches + 1) + 2 * patches * width * 3 * patch ** 2, tower(length)
    head = {"uniclip": 2 * (11 * seen + 2 * seen ** 2 + 3 * ((width + seen) * width + width ** 2) + width * dim)}
    words = 0.15 * length * 2 * width * model.text.token.num_embeddings
    more = {"slip": 2 * 2 * (width * 64 + 64 * 64 + 64 * 256),
            "declip": 2 * 2 * (width * 64 + 2 * 64 * 64 + 2 * 64 * 32) + words - 2 * width * dim}
    loss = 2 * (views + 1) ** 2 * batch * dim
    forward = views * (image + head.get(name, 2 * width * dim)) + texts * (text + 2 * width * dim) + more.get(name, 0) + loss
    assert flops_per_sample(model, views, batch, texts) == pytest.approx(3 * forward, rel=0.001)
    if name != "declip":  # `check` knows only the vocabulary that is asked for
        assert sizes_of(config).flops == flops_per_sample(model, views, batch)
