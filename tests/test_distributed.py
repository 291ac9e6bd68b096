"""Ranks and accumulation against one process, for every case of the oracle and for a model under DDP.

Each world's processes start once and run every case. W ranks, B groups, V views, T texts, D embedding.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import FORKSERVER, World, share

from pipeline.console import InputError, WorkFailed
from pipeline.ledger import Ledger
from trainer.accumulation import chunks, forward_backward
from trainer.distributed import ALONE, Ranks, process_group
from trainer.losses import LOSSES
from trainer.parallel import Step, parallel
from trainer.similarity import Similarity
from trainer.tiles import tiled_loss

ORACLE = json.loads((Path(__file__).parent / "oracle" / "losses.json").read_text())
NAMES = {
    "mp_nce_eq12": ("mp_nce", "unified"),
    "mp_nce_unweighted_eq11": ("mp_nce_unweighted", "unified"),
    "multi_positive_infonce_eq9": ("multi_positive_infonce", "unified"),
    "mil_nce_eq4": ("mil_nce", "unified"),
    "supcon": ("supcon", "unified"),
    "mp_nce_separate_supervision": ("mp_nce", "separate"),
}
KEYS = ("image", "text", "temperature", "offset")
IMPLEMENTATIONS = ("dense", "tile 1", "tile 3", "tile 64")
WORLDS = (1, 2, 4)
ACCUMULATIONS = (1, 2, 4)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """World by size, started when first asked for."""
    started: dict[int, World] = {}

    def world(size: int) -> World:
        if size not in started:
            started[size] = World(size, tmp_path_factory.mktemp("world") / "rendezvous")
        return started[size]

    yield world
    for each in started.values():
        each.close()


class Table(nn.Module):
    """A model whose parameters are the embeddings themselves."""

    def __init__(self, image, text, temperature, offset):
        super().__init__()
        self.image, self.text, self.temperature, self.offset = (
            nn.Parameter(torch.as_tensor(x, dtype=torch.float64).clone()) for x in (image, text, temperature, offset))

    def forward(self, part: slice):
        return self.image[part], self.text[part], self.temperature, self.offset


def over_ranks(ranks: Ranks, loss: Callable, image, text, temperature, offset, supervision, group_id, valid):
    """A loss without ranks, of the gathered batch: each rank has its own groups' gradients, and 1/W of those of τ and b."""
    first, count = ranks.rank * ranks.slots, len(image)
    ids, valids = ranks.gather(torch.stack([group_id, valid.long()], 1)).unbind(1)
    images, texts = (torch.cat([every[:first], x, every[first + count:]]) for x, every in
                     ((x, ranks.gather(x)) for x in (image, text)))
    temperature, offset = (x / ranks.world + (x - x / ranks.world).detach() for x in (temperature, offset))
    return loss(images, texts, temperature, offset, supervision, ids, valids.bool())


def loss_function(implementation: str, name: str, ranks: Ranks) -> Callable:
    if implementation == "dense":
        return LOSSES[name] if ranks.world == 1 else partial(over_ranks, ranks, LOSSES[name])
    return partial(tiled_loss, name, ranks=ranks, tile=int(implementation.removeprefix("tile ")))


def run_oracle(rank: int, world: int) -> dict[tuple[str, int], list]:
    """By implementation and accumulation: every case on this rank's groups."""
    return {(implementation, accumulation): [run_case(rank, world, implementation, accumulation, case) for case in ORACLE]
            for implementation in IMPLEMENTATIONS for accumulation in ACCUMULATIONS}


def run_case(rank: int, world: int, implementation: str, accumulation: int, case: dict) -> tuple[float, list]:
    batch = len(case["image"])
    mine, ranks = share(rank, world, batch), Ranks(rank, world, batch)
    name, supervision = NAMES[case["name"]]
    group_id = torch.tensor(case["group_id"] or list(range(batch)))[mine]
    valid = torch.tensor(case["valid"] or [True] * batch)[mine]
    loss_of = loss_function(implementation, name, ranks)
    local = np.array(case["image"])[mine]
    table = Table(local, np.array(case["text"])[mine], case["temperature"], case["offset"])
    parts = [(share(n, accumulation, len(local)),) for n in range(accumulation)]
    loss_of = partial(loss_of, supervision=supervision, group_id=group_id, valid=valid)
    loss = forward_backward(table, parts, loss_of, ranks)
    return loss.item(), [(p.grad / world).numpy() for p in table.parameters()]


@pytest.fixture(scope="module")
def oracle_results(worlds) -> dict[int, list[dict]]:
    """By world, the results of each rank. The worlds work at the same time: they mostly wait for each other's messages."""
    for world in WORLDS[1:]:
        worlds(world).start(run_oracle)
    return {1: [run_oracle(0, 1)], **{world: worlds(world).results() for world in WORLDS[1:]}}


def title(number: int) -> str:
    case = ORACLE[number]
    return f"{case['name']}-V{case['V']}T{case['T']}-{'shared' if case['shared_similarity'] else 'domain'}-{case['extra']}"


@pytest.mark.parametrize("number", range(len(ORACLE)), ids=title)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_loss_and_gradients_equal_the_oracle(oracle_results, number, implementation, world, accumulation):
    by_rank = [results[implementation, accumulation][number] for results in oracle_results[world]]
    case = ORACLE[number]
    for loss, _ in by_rank:
        assert abs(loss - case["loss"]) < 1e-10
    for key, gradients in zip(KEYS, zip(*(gradients for _, gradients in by_rank), strict=True), strict=True):
        whole = np.concatenate(gradients) if key in ("image", "text") else sum(gradients)
        expected = np.array(case["grad_" + key]).reshape(whole.shape)
        np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-10, err_msg=key)


LAYOUTS = {
    "unequal slices": {"batch": 7},
    "ranks without a valid group": {"batch": 6, "valid": [True, True, False, False, False, False]},
    "one valid group": {"batch": 5, "valid": [False, False, True, False, False]},
    "fewer groups than ranks": {"batch": 1},
    "duplicates on several ranks": {"batch": 7, "group_id": [3, 1, 3, 3, 0, 1, 9]},
}


def drawn(batch: int, views: int, texts: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    return {"image": normal(batch, views, 6), "text": normal(batch, texts, 6),
            "temperature": torch.tensor([0.1, 0.2, 0.15]).double(), "offset": torch.tensor([0.3, -0.1, 0.2]).double()}


def run_layout(rank: int, world: int, title: str, name: str, supervision: str, tile: int) -> list:
    """(loss, gradients) of this rank's groups in double precision, two tiles' worth of chunks."""
    layout, batch = LAYOUTS[title], LAYOUTS[title]["batch"]
    mine, whole = share(rank, world, batch), drawn(batch, 2, 1)
    table = Table(whole["image"][mine], whole["text"][mine], whole["temperature"], whole["offset"])
    ids, valid = (None if key not in layout else torch.tensor(layout[key])[mine] for key in ("group_id", "valid"))
    ranks = Ranks(rank, world, batch)
    loss_of = partial(tiled_loss, name, supervision=supervision, group_id=ids, valid=valid, ranks=ranks, tile=tile)
    loss = forward_backward(table, [(slice(0, 1),), (slice(1, None),)], loss_of, ranks)
    return [loss.item(), *((p.grad / world).numpy() for p in table.parameters())]


@pytest.mark.parametrize("name, supervision", sorted(set(NAMES.values())))
@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("title", LAYOUTS)
def test_any_layout_over_ranks_equals_one_dense_process(worlds, title, world, name, supervision):
    whole, layout = drawn(LAYOUTS[title]["batch"], 2, 1), LAYOUTS[title]
    inputs = [whole[key].requires_grad_() for key in KEYS]
    ids, valid = (None if key not in layout else torch.tensor(layout[key]) for key in ("group_id", "valid"))
    expected = LOSSES[name](*inputs, supervision=supervision, group_id=ids, valid=valid)
    gradients = torch.autograd.grad(expected, inputs)
    results = worlds(world).run(run_layout, title, name, supervision, 4)
    losses, images, texts, temperatures, offsets = zip(*results, strict=True)
    np.testing.assert_allclose(losses, [expected.item()] * world, rtol=0, atol=1e-10)
    for got, gradient in zip((np.concatenate(images), np.concatenate(texts), sum(temperatures), sum(offsets)), gradients,
                             strict=True):
        np.testing.assert_allclose(got, gradient.numpy(), rtol=0, atol=1e-9)


def run_without_valid_groups(rank: int, world: int) -> str:
    whole = drawn(4, 2, 1)
    mine = share(rank, world, 4)
    with pytest.raises(ValueError) as error:
        tiled_loss("mp_nce", whole["image"][mine], whole["text"][mine], whole["temperature"], whole["offset"],
                   valid=torch.zeros(4 // world, dtype=torch.bool), ranks=Ranks(rank, world, 4))
    return str(error.value)


def test_a_batch_without_a_valid_group_is_an_error_on_every_rank(worlds):
    assert worlds(2).run(run_without_valid_groups) == ["the loss of a batch without a valid group is undefined"] * 2


def run_ledger(rank: int, world: int, path: Path, begin: int, batches: int) -> tuple[int, str, list]:
    """Batches of 50; every fifth, later each, holds a sample that one rank finds bad → where and why it stopped, counts."""
    ledger, counts = Ledger.resumed(path, 0.01, begin, Ranks(rank, world, 50).sum), []
    for number in range(begin // 50, begin // 50 + batches):
        mine = share(rank, world, 50)
        met = number // 5 % world == rank and (number % 5 == 4 or number >= 20)
        try:
            ledger.count(mine.stop - mine.start, [{"samples": 50 * number + 50, "key": str(number)}] if met else [])
        except WorkFailed as error:
            return number, str(error), counts
        counts.append((ledger.seen, ledger.bad))
    return -1, "", counts


@pytest.mark.parametrize("world", [2, 4])
def test_bad_samples_are_counted_over_all_ranks_and_stop_them_together(worlds, world, tmp_path):
    """The same counts and the same end on one rank, on several, and after a resume on several."""
    (alone,) = worlds(1).run(run_ledger, tmp_path / "alone.jsonl", 0, 60)
    ranks = worlds(world).run(run_ledger, tmp_path / "ranks.jsonl", 0, 60)
    assert alone[2][19] == (1000, 4)
    assert alone[0] == 32
    assert alone[1].startswith("17 of 1650 samples could not be decoded")
    assert ranks == [(alone[0], alone[1].replace("alone", "ranks"), alone[2])] * world
    worlds(1).run(run_ledger, tmp_path / "parts.jsonl", 0, 15)
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write(json.dumps({"samples": 800, "key": "of a faster rank"}) + "\n")
    resumed = worlds(world).run(run_ledger, tmp_path / "parts.jsonl", 750, 45)
    assert [(number, counts) for number, _, counts in resumed] == [(alone[0], alone[2][15:])] * world


def test_a_slice_larger_than_its_share_names_rank_and_batch():
    with pytest.raises(ValueError, match="rank 1 holds 3 groups, but a global batch of 4 over 2 ranks leaves each"):
        Ranks(1, 2, 4).gather(torch.zeros(3))


class Collectives(TorchDispatchMode):
    """Writes down every collective: its name and the number of elements it sends."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sent = args[1] if "allgather" in func.__name__ else args[0]
            self.calls.append((func.__name__, sum(x.numel() for x in ([sent] if torch.is_tensor(sent) else sent))))
        return func(*args, **(kwargs or {}))


def run_counted(rank: int, world: int, supervision: str) -> list[tuple[str, int]]:
    whole = drawn(8, 3, 1)
    mine = share(rank, world, 8)
    table = Table(whole["image"][mine], whole["text"][mine], whole["temperature"], whole["offset"])
    ranks = Ranks(rank, world, 8)
    with Collectives() as collectives:
        forward_backward(table, [(slice(0, 2),), (slice(2, None),)],
                         partial(tiled_loss, "mp_nce", supervision=supervision, ranks=ranks, tile=4), ranks)
    return collectives.calls


@pytest.mark.parametrize("supervision, kinds", [("unified", 1), ("separate", 2)])
def test_a_step_sends_embeddings_ids_and_one_number_for_each_sum_and_nothing_else(worlds, supervision, kinds):
    groups, embeddings, width = 4, 4 * (3 + 1), 6  # of each rank
    for calls in worlds(2).run(run_counted, supervision):
        assert calls == [("_allgather_base_.default", 2 * groups), ("_allgather_base_.default", embeddings * width),
                         ("_allgather_base_.default", embeddings * kinds)]


class Towers(nn.Module):
    """A small model with the interface of UniCLIP."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 5))
        self.text = nn.Linear(4, 5)
        self.similarity = Similarity("domain", temperature=0.2)

    def forward(self, views, vector_BVA, token_BTL):
        return torch.stack([self.image(view) for view in views], dim=1), self.text(token_BTL)


def towers_and_data(dtype: torch.dtype, dropout: float = 0.0, batch: int = 6) -> tuple[Towers, tuple]:
    torch.manual_seed(0)
    model = Towers(dropout).to(dtype)
    return model, ([torch.randn(batch, 6, dtype=dtype) for _ in range(3)], torch.zeros(batch, 3, 11, dtype=dtype),
                   torch.randn(batch, 1, 4, dtype=dtype))


def run_training(rank: int, world: int, accumulation: int, dtype: torch.dtype, steps: int) -> tuple:
    """Losses, last gradients and weights of a few steps of AdamW under DDP."""
    model, (views, vectors, tokens) = towers_and_data(dtype)
    mine, ranks = share(rank, world, len(vectors)), Ranks(rank, world, len(vectors))
    parts = chunks(accumulation, [view[mine] for view in views], vectors[mine], tokens[mine])
    step = parallel(Step(model), ranks, "cpu")
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        losses.append(forward_backward(step, parts, partial(tiled_loss, "mp_nce", ranks=ranks, tile=5), ranks).item())
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    return losses, {name: p.grad.numpy() for name, p in model.named_parameters()}, weights


def train_dense(dtype: torch.dtype, steps: int) -> tuple:
    model, data = towers_and_data(dtype)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = LOSSES["mp_nce"](*Step(model)(*data))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    return losses, {name: p.grad.numpy() for name, p in model.named_parameters()}, weights


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_gradients_under_ddp_equal_one_dense_process(worlds, world, accumulation):
    losses, expected, _ = train_dense(torch.float64, 1)
    for loss, gradients, _ in worlds(world).run(run_training, accumulation, torch.float64, 1):
        np.testing.assert_allclose(loss, losses, rtol=0, atol=1e-10)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("world, accumulation", [(1, 2), (2, 1), (4, 4)])
def test_training_in_float32_is_the_same_on_any_number_of_ranks(worlds, world, accumulation):
    losses, _, expected = train_dense(torch.float32, 5)
    for loss, _, weights in worlds(world).run(run_training, accumulation, torch.float32, 5):
        np.testing.assert_allclose(loss, losses, rtol=0, atol=1e-5)
        np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-5)


def test_accumulation_restores_the_random_state_of_every_part():
    model, data = towers_and_data(torch.float64, dropout=0.5)
    step, parts = Step(model), chunks(3, *data)
    torch.manual_seed(1)
    outputs = [step(*part) for part in parts]
    images, texts = (torch.cat([output[k] for output in outputs]) for k in (0, 1))
    LOSSES["mp_nce"](images, texts, *outputs[0][2:]).backward()
    expected, state = [p.grad for p in model.parameters()], torch.get_rng_state()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    forward_backward(step, parts, partial(tiled_loss, "mp_nce"))
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=0, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(8, "cpu") as (ranks, device):
        assert (ranks, device) == (ALONE, "cpu")


def test_more_processes_than_groups_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 processes share batches of 2"), process_group(2, "cpu"):
        pass


def die_or_wait(rank: int, port: int, pipe) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with process_group(4, "cpu", timeout_minutes=0.1) as (ranks, _):
        ranks.gather(torch.zeros(2))
        if rank == 1:
            os._exit(1)
        try:
            ranks.gather(torch.zeros(2))
        except RuntimeError as error:
            pipe.send((ranks.rank, ranks.world, str(error)))
            os._exit(0)


def test_the_others_end_with_an_error_when_a_rank_dies():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here, there = FORKSERVER.Pipe()
    processes = [FORKSERVER.Process(target=die_or_wait, args=(rank, port, there)) for rank in range(2)]
    begin = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    rank, world, message = here.recv()
    assert (rank, world) == (0, 2)
    assert message
    assert time.monotonic() - begin < 60
