"""The loss of a whole batch, and its gradient, in parts: only one part at a time has a graph."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainer.distributed import ALONE, Ranks
from trainer.parallel import Embeddings, average_heads, unsynchronised


def chunks(count: int, views: list[Tensor], vector_BVA: Tensor, token_BTL: Tensor) -> list[tuple]:
    """A rank's groups as the arguments of `count` consecutive forwards; fewer where there are fewer groups.

    With sharded weights every rank must make as many: ask for no more than the smallest share of a batch.
    """
    groups = len(vector_BVA)
    count = max(1, min(count, groups))
    parts = [slice(n * groups // count, (n + 1) * groups // count) for n in range(count)]
    return [([view[part] for view in views], vector_BVA[part], token_BTL[part]) for part in parts]


def forward_backward(step: nn.Module, parts: Sequence[tuple], loss_of: Callable[..., Tensor], ranks: Ranks = ALONE
                     ) -> Tensor:
    """The loss of all parts together; gradients are left in the parameters, averaged by DDP where `step` is wrapped.

    step(*part) → Embeddings; loss_of(*Embeddings) → the global loss. With several parts only one at a time has a graph:
    first every embedding without one, then the loss, then each part again, under the random state of its first time.
    """
    if len(parts) == 1:
        loss = loss_of(*step(*parts[0]))
        ranks.for_averaging(loss).backward()
        average_heads(step, ranks)
        return loss.detach()
    states, outputs = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state())
            outputs.append(step(*part))
    *of_groups, temperatures, offsets = zip(*outputs, strict=True)
    inputs = [x.detach().requires_grad_() for x in (*map(torch.cat, of_groups), temperatures[0], offsets[0])]
    loss = loss_of(*inputs)
    ranks.for_averaging(loss).backward()
    *whole_B, of_temperature, of_offset = (torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)
    of_similarity, sizes = (of_temperature, of_offset), [len(x) for x in of_groups[0]]
    pieces = list(zip(parts, states, *(x_B.split(sizes) for x_B in whole_B), strict=True))
    for n, (part, state, *gradients) in enumerate(pieces):
        last = n == len(pieces) - 1
        _set_random_state(state)
        # DDP reduces with the last part. τ and b are in every part, but their gradient is the whole loss's: it counts once.
        with nullcontext() if last else unsynchronised(step):
            _backward(step(*part), [*gradients, *of_similarity] if last else gradients)
    average_heads(step, ranks)
    return loss.detach()


def _backward(outputs: Embeddings, gradients: list[Tensor]) -> None:
    wanted = [(x, g) for x, g in zip(outputs, gradients, strict=False) if x.requires_grad]
    torch.autograd.backward([x for x, _ in wanted], [g for _, g in wanted])


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
