"""Baselines: every term against a computation by hand, where gradients go, and the same on any number of ranks.

B groups, V views, T texts, D embedding, H width of a projection.
"""

import math

import numpy as np
import pytest
import torch
from short_runs import TINY
from torch import nn
from worlds import World, share

from pipeline.console import InputError
from pipeline.schema import Batch
from tools.paper_rows import FULL, ROWS
from trainer.accumulation import chunks, forward_backward
from trainer.auxiliary import GlobalBatchNorm, Queue
from trainer.config_file import load_config
from trainer.distributed import ALONE, Ranks
from trainer.model import UniCLIP
from trainer.objectives import OBJECTIVES, Given, Objective, masked_words, neighbour, nt_xent, simsiam
from trainer.parallel import Step, parallel

DOUBLE, VOCAB, END, LENGTH = torch.float64, 40, 2, 9
SMALL = ["objective.hidden=24", "objective.queue=10", *(f"{key}={value}" for key, value in TINY.items())]


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_simclr_is_nt_xent_written_out():
    z_B2H = drawn(0, 5, 2, 7)
    z, total = unit(z_B2H.numpy()), 0.0
    for i in range(5):
        for a in range(2):
            others = [z[i, a] @ z[j, b] / 0.1 for j in range(5) for b in range(2) if (i, a) != (j, b)]
            total += math.log(sum(map(math.exp, others))) - z[i, a] @ z[i, 1 - a] / 0.1
    assert nt_xent(z_B2H, torch.arange(5), ALONE).item() == pytest.approx(total / 10, abs=1e-12)


def test_simsiam_is_the_mean_cosine_and_stops_gradients_at_the_projection():
    p, z = ([drawn(seed, 4, 6).requires_grad_() for seed in seeds] for seeds in ((1, 2), (3, 4)))
    loss = simsiam(p, z, ALONE)
    cosine = [(unit(p[a].detach().numpy()) * unit(z[1 - a].detach().numpy())).sum(1).mean() for a in (0, 1)]
    assert loss.item() == pytest.approx(-sum(cosine) / 2, abs=1e-12)
    loss.backward()
    assert all(x.grad is not None and x.grad.any() for x in p)
    assert all(x.grad is None for x in z)


def batch_of(image_BVD: torch.Tensor, group_id: list[int] | None = None, valid: list[bool] | None = None) -> Batch:
    count = len(image_BVD)
    return Batch([], torch.zeros(count, 0, 11), torch.zeros(count, 1, 3, dtype=torch.long), torch.arange(count),
                 torch.tensor(group_id or list(range(count))), torch.tensor(valid or [True] * count))


def test_the_nearest_text_of_the_queue_is_the_positive():
    """By hand: the queue holds three axes; texts lie near the second, the first, the first."""
    queue = Queue(4, 3).double()
    assert torch.equal(queue.nearest(drawn(0, 2, 3)), drawn(0, 2, 3)), "of an empty queue the text itself"
    queue.push(torch.eye(3))
    text = torch.tensor([[0.1, 0.9, 0], [0.8, 0.1, 0.2], [0.9, 0.3, 0]], dtype=DOUBLE)
    near = queue.nearest(text)
    assert torch.equal(near, torch.eye(3, dtype=DOUBLE)[[1, 0, 0]])
    image, temperature = drawn(5, 3, 2, 3).requires_grad_(), torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    loss = neighbour(image, near, temperature, batch_of(image), ALONE)
    z = unit(image.detach().numpy())
    rows = [[z[i, v] @ near[j].numpy() / 0.3 for j in range(3)] for i in range(3) for v in range(2)]
    expected = np.mean([math.log(sum(map(math.exp, row))) - row[n // 2] for n, row in enumerate(rows)])
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    image_grad, temperature_grad = torch.autograd.grad(loss, (image, temperature))
    assert image_grad.any()
    assert temperature_grad.any()


def test_groups_of_one_id_are_no_negatives_and_invalid_ones_are_nothing():
    image, near = drawn(5, 4, 1, 3), nn.functional.normalize(drawn(6, 4, 3), dim=1)
    temperature = torch.tensor(0.3, dtype=DOUBLE)
    loss = neighbour(image, near, temperature, batch_of(image, [7, 7, 8, 9], [True, True, True, False]), ALONE)
    logit = unit(image[:, 0].numpy()) @ near.numpy().T / 0.3
    expected = np.mean([math.log(sum(math.exp(logit[i, j]) for j in seen)) - logit[i, i]
                        for i, seen in ((0, (0, 2)), (1, (1, 2)), (2, (0, 1, 2)))])
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_the_queue_keeps_the_newest_texts():
    queue = Queue(5, 1)
    for first in (0, 3, 6):
        queue.push(torch.arange(first, first + 3.0)[:, None])
    assert sorted(queue.text_QD.flatten().tolist()) == [4, 5, 6, 7, 8]
    queue.push(torch.arange(20, 32.0)[:, None])
    assert sorted(queue.text_QD.flatten().tolist()) == [27, 28, 29, 30, 31]
    assert not queue.state_dict(), "it is no part of the weights"


def test_masked_words_are_averaged_over_words_not_groups():
    loss_B2 = torch.tensor([[6.0, 3], [0, 0], [1, 1]], requires_grad=True)
    loss = masked_words(loss_B2, ALONE)
    loss.backward()
    assert loss.item() == 7 / 4
    assert loss_B2.grad is not None
    assert torch.equal(loss_B2.grad[:, 1], torch.zeros(3)), "the number of words has no gradient"


def configured(name: str, *more: str):
    return load_config("scenes-tiny", [f"objective.name={name}", *SMALL, *more])


def made(name: str, dtype: torch.dtype = DOUBLE, groups: int = 6, *more: str):
    """Configuration, model and a batch: its last group is invalid, two share an id, of DeCLIP some words are masked."""
    config = configured(name, *more)
    torch.manual_seed(0)
    model = UniCLIP(config.model, VOCAB, END, config.learns_offset, config.objective).to(dtype)
    rng, views = np.random.default_rng(0), len(config.data.kinds())
    tokens = rng.integers(3, VOCAB, (groups, config.objective.texts, LENGTH))
    tokens[:, :, 0], tokens[:, :, 6] = 1, END
    if name == "declip":
        tokens[:, 2] = tokens[:, 0]
        tokens[:, 2, 2:4] = -1 - tokens[:, 2, 2:4]
        tokens[1, 2] = tokens[1, 0]  # a text without a masked word
    vectors = torch.from_numpy(rng.random((groups, views, 11))).to(dtype)
    batch = Batch([torch.from_numpy(rng.normal(size=(groups, 3, 24, 24))).to(dtype) for _ in range(views)], vectors,
                  torch.from_numpy(tokens), torch.arange(groups), torch.tensor([0, 1, 1, *range(3, groups)]),
                  torch.tensor([True] * (groups - 1) + [False]))
    if name == "declip":
        with torch.no_grad():
            known = nn.functional.normalize(model.encode_text(batch.tokens[:, 0]), dim=1)
        model.auxiliary.queue.push(torch.cat([known[:4], drawn(9, 4, config.model.dim).to(dtype)]))
    return config, model, batch


PARTS = {"clip": {"image", "text", "image_head", "text_head", "similarity"}, "simclr": {"image", "auxiliary"},
         "simsiam": {"image", "auxiliary"}, "masked": {"text", "auxiliary"}, "neighbour": {"image", "image_head", "similarity"}}


@pytest.mark.parametrize("name", ["clip", "slip", "declip"])
def test_each_term_reaches_its_parts_and_no_others_and_all_parameters_learn(name):
    config, model, batch = made(name)
    image_BVD, text_BTD, *more, temperature_3, offset_3 = Step(model)(batch.views, batch.vectors, batch.tokens)
    terms = OBJECTIVES[name][0](Given(config, ALONE, model.auxiliary, batch, image_BVD, text_BTD, tuple(more),
                                      temperature_3, offset_3))
    assert set(terms) == set(OBJECTIVES[name][1])
    parameters, reached = {n: p for n, p in model.named_parameters() if p.requires_grad}, set()
    for term, loss in terms.items():
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        found = {n for n, g in zip(parameters, gradients, strict=True) if g is not None and g.abs().max() > 1e-12}
        assert {n.partition(".")[0] for n in found} == PARTS[term], term
        reached |= found
    assert set(parameters) == reached
    if name == "slip":  # CLIP's part of SLIP sees the weak view alone, SimCLR's the other two
        for loss, views in ((terms["clip"], [True, False, False]), (terms["simclr"], [False, True, True])):
            pixels = [view.clone().requires_grad_() for view in batch.views]
            again = replayed(config, model, batch, pixels)
            gradients = torch.autograd.grad(again["clip" if loss is terms["clip"] else "simclr"], pixels, allow_unused=True)
            assert [g is not None and bool(g.any()) for g in gradients] == views


def replayed(config, model, batch: Batch, views: list[torch.Tensor]):
    image_BVD, text_BTD, *more, temperature_3, offset_3 = Step(model)(views, batch.vectors, batch.tokens)
    return OBJECTIVES[config.objective.name][0](Given(config, ALONE, model.auxiliary, batch, image_BVD, text_BTD, tuple(more),
                                                      temperature_3, offset_3))


def test_clip_is_symmetric_cross_entropy():
    config, model, batch = made("clip")
    with torch.no_grad():
        images, texts, temperature_3, _ = Step(model)(batch.views, batch.vectors, batch.tokens)
        loss = Objective(config, ALONE)(batch, *Step(model)(batch.views, batch.vectors, batch.tokens)).item()
    logit = unit(images[:5, 0].numpy()) @ unit(texts[:5, 0].numpy()).T / temperature_3[1].item()
    logit[1, 2] = logit[2, 1] = -np.inf  # one id
    rows = [np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logit, logit.T)]
    assert loss == pytest.approx(np.mean(rows), abs=1e-10)


def test_declip_weighs_its_terms_as_published_and_averages_four_pairs():
    config, model, batch = made("declip")
    objective = Objective(config, ALONE, model.auxiliary)
    with torch.no_grad():
        outputs = Step(model)(batch.views, batch.vectors, batch.tokens)
        loss = objective(batch, *outputs).item()
        pairs = [Objective(configured("clip"), ALONE)(batch, outputs[0][:, [v]], outputs[1][:, [t]], *outputs[-2:]).item()
                 for v in (0, 1) for t in (0, 1)]
    told = objective.numbers(batch)
    terms = told["terms"]
    assert terms["clip"] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert loss == pytest.approx(0.4 * terms["clip"] + 0.2 * (terms["simsiam"] + terms["masked"] + terms["neighbour"]))
    assert told["chance_loss"] > loss - 1.5
    assert told["floor_loss"] < -0.1
    alone = Objective(configured("clip"), ALONE)
    alone(batch, *outputs[:2], *outputs[-2:])
    chance = alone.numbers(batch)["chance_loss"]
    assert told["chance_loss"] == pytest.approx(0.6 * chance + 0.2 * math.log(VOCAB))


def test_the_queue_takes_valid_texts_after_an_update_and_only_then():
    config, model, batch = made("declip")
    objective, before = Objective(config, ALONE, model.auxiliary), int(model.auxiliary.queue.pushed)
    outputs = Step(model)(batch.views, batch.vectors, batch.tokens)
    objective(batch, *outputs)
    assert int(model.auxiliary.queue.pushed) == before
    objective.keep(batch)
    assert int(model.auxiliary.queue.pushed) == before + 5
    held = model.auxiliary.queue.text_QD[[8, 9, 0, 1, 2]]
    torch.testing.assert_close(held, nn.functional.normalize(outputs[1][:5, 0].detach(), dim=1), rtol=0, atol=1e-6)


def norm_of(rank: int, world: int, sizes: list[int]) -> tuple:
    norm, x_NH = GlobalBatchNorm(4).double(), drawn(0, sum(sizes), 4)
    with torch.no_grad():
        norm.weight.copy_(drawn(1, 4))
        norm.bias.copy_(drawn(2, 4))
    x_BH = x_NH.split(sizes)[rank].clone().requires_grad_()
    y_BH = norm(x_BH, Ranks(rank, world, sum(sizes)))
    (y_BH * drawn(3, sum(sizes), 4).split(sizes)[rank]).sum().backward()
    return tuple(t.detach().numpy() for t in (y_BH, x_BH.grad, norm.weight.grad, norm.bias.grad))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    world = World(2, tmp_path_factory.mktemp("world") / "rendezvous")
    yield world
    world.close()


@pytest.mark.parametrize("sizes", [[4, 4], [7, 1], [8, 0]])
def test_batch_norm_over_ranks_is_torchs_over_all_rows(pair, sizes):
    norm, x_NH = nn.BatchNorm1d(4).double(), drawn(0, 8, 4).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(drawn(1, 4))
        norm.bias.copy_(drawn(2, 4))
    y_NH = norm(x_NH)
    (y_NH * drawn(3, 8, 4)).sum().backward()
    got = list(zip(*pair.run(norm_of, sizes), strict=True))
    for whole, expected in ((np.concatenate(got[0]), y_NH), (np.concatenate(got[1]), x_NH.grad),
                            (sum(got[2]), norm.weight.grad), (sum(got[3]), norm.bias.grad)):
        np.testing.assert_allclose(whole, expected.detach().numpy(), rtol=0, atol=1e-12)


def step_of(rank: int, world: int, name: str, accumulation: int) -> tuple[float, dict, np.ndarray]:
    """Loss, gradients and queue of two steps of a whole model in double precision, the last slice one group shorter."""
    config, model, batch = made(name, DOUBLE, 7)
    ranks, mine = Ranks(rank, world, 7), share(rank, world, 7)
    batch = Batch([view[mine] for view in batch.views], *(getattr(batch, key)[mine] for key in (
        "vectors", "tokens", "sample_id", "group_id", "valid")))
    step, objective = parallel(Step(model), ranks, "cpu"), Objective(config, ranks, model.auxiliary)
    parts, loss = chunks(accumulation, batch.views, batch.vectors, batch.tokens), torch.zeros(())
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        loss = forward_backward(step, parts, objective.of(batch), ranks)
        objective.keep(batch)
    queue = model.auxiliary.queue.text_QD.numpy() if name == "declip" else np.zeros(0)
    return loss.item(), {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}, queue


@pytest.mark.parametrize("name", ["clip", "slip", "declip"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_and_accumulation_give_the_gradients_of_one_process(pair, name, accumulation):
    loss, expected, queue = step_of(0, 1, name, 1)
    runs = [*pair.run(step_of, name, accumulation), step_of(0, 1, name, accumulation)]
    for got, gradients, held in runs:
        assert got == pytest.approx(loss, abs=1e-9)
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            np.testing.assert_allclose(gradient, expected[key], rtol=0, atol=1e-9, err_msg=key)
        np.testing.assert_allclose(held, queue, rtol=0, atol=1e-6)


@pytest.mark.parametrize("row", [(table, name) for table, rows in ROWS.items() for name in rows], ids=" ".join)
def test_every_row_of_the_paper_builds_and_makes_a_step(row):
    table, name = row
    config, model, batch = made_of(ROWS[table][name])
    objective = Objective(config, ALONE, model.auxiliary)
    loss = forward_backward(Step(model), chunks(1, batch.views, batch.vectors, batch.tokens), objective.of(batch))
    assert torch.isfinite(loss)
    for key, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, key
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    assert all(torch.isfinite(torch.tensor(objective.numbers(batch)[key])) for key in ("chance_loss", "floor_loss"))


def made_of(row: tuple[str, ...]):
    given = dict(override.split("=", 1) for override in row)
    return made(given.pop("objective.name", "uniclip"), torch.float32, 6, *(f"{key}={value}" for key, value in given.items()))


def test_the_rows_are_the_papers():
    assert {table: len(rows) for table, rows in ROWS.items()} == {"4a": 9, "4b": 6, "5": 3, "6": 5, "1": 4}
    full = load_config("scenes-tiny")
    for table, name in FULL.items():
        assert load_config("scenes-tiny", list(ROWS[table][name])) == full, table
    different = [load_config("scenes-tiny", list(row)) for rows in ROWS.values() for row in rows.values()]
    repeated = 4 + 1  # the full model is in five tables, one block without the embedding in two
    assert len({config.to_toml() for config in different}) == len(different) - repeated


def test_a_baseline_sets_what_it_is_made_of_unless_the_file_says_otherwise():
    clip = load_config("scenes-tiny", ["objective.name=clip"])
    assert (clip.data.recipe, clip.model.text.pooling, clip.model.head.augmentation) == ("clip", "end", False)
    assert (clip.model.head.kind, clip.model.head.depth, clip.model.similarity.kind) == ("mlp", 1, "shared")
    assert not clip.learns_offset
    assert load_config("scenes-tiny", ["objective.name=clip", "model.text.pooling=start"]).model.text.pooling == "start"
    assert load_config("scenes-tiny", ["objective.name=declip"]).data.recipe == "declip"


@pytest.mark.parametrize("words, message", [
    (["objective.name=clip", "data.recipe=uniclip"], "needs one view, data.recipe gives weak, strong, strong: set"),
    (["objective.name=slip", "data.recipe=3weak"], "two strong or medium ones"),
    (["objective.name=declip", "data.recipe=clip"], "needs two views"),
    (["objective.name=slip", "loss.name=supcon"], r"leave \[loss\] out"),
    (["objective.name=clip", "model.similarity.kind=domain"], "set model.similarity.kind=shared"),
    (["objective.name=declip", "run.sharding=fsdp"], "set run.sharding=none"),
    (["objective.name=declop"], "objective.name = 'declop'"),
])
def test_what_an_objective_cannot_use_is_refused(words, message):
    with pytest.raises(InputError, match=message) as error:
        load_config("scenes-tiny", words)
    assert len(str(error.value)) < 250
