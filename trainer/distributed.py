"""The only file that knows ranks: the process group, what crosses the wire, DDP and its scale, accumulation.

A global batch of N groups over W ranks: rank r holds groups ⌊rN/W⌋ … ⌊(r+1)N/W⌋, in P = ⌈N/W⌉ slots on the wire. B groups
on this rank, V views, T texts, D embedding.
"""

import os
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.console import InputError, WorkFailed
from trainer.heartbeat import Heartbeat
from trainer.losses import NoValidGroup

POLL = 0.1  # seconds
Embeddings = tuple[Tensor, ...]  # image (B, V, D), text (B, T, D), more of each group, temperature (3,), offset (3,)


@dataclass(frozen=True)
class Groups:
    """The valid groups of the global batch, sorted by id: own ones by their place here, and foreign ones."""

    own: Tensor
    own_id: Tensor
    foreign_id: Tensor
    exchange: Callable[[Tensor], Tensor]  # what belongs to own groups → the same of foreign groups; one collective


@dataclass(frozen=True)
class Ranks:
    """This process among the W that share a global batch of `batch` groups."""

    rank: int = 0
    world: int = 1
    batch: int = 0

    @property
    def slots(self) -> int:
        """P: groups of each rank on the wire."""
        return -(-self.batch // self.world)

    def gather(self, x_B: Tensor) -> Tensor:
        """Every rank's rows, those of rank r from r·P on, zeros where it has fewer → (W·P, …). One collective."""
        if len(x_B) > self.slots:
            raise ValueError(f"rank {self.rank} holds {len(x_B)} groups, but a global batch of {self.batch} over "
                             f"{self.world} ranks leaves each at most {self.slots}")
        mine_P = torch.cat([x_B.detach(), x_B.new_zeros(self.slots - len(x_B), *x_B.shape[1:])])
        every = mine_P.new_empty(self.world * self.slots, *x_B.shape[1:])
        dist.all_gather_into_tensor(every, mine_P)
        return every

    def everyone(self, x_B: Tensor) -> Tensor:
        """As `gather`; alone, what is given."""
        return self.gather(x_B) if self.world > 1 else x_B

    @property
    def first(self) -> int:
        """Where this rank's rows begin among everyone's."""
        return self.rank * self.slots if self.world > 1 else 0

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, whose gradient is the sum of all ranks' gradients. One collective, which all must call."""
        return differentiable.all_reduce(x) if self.world > 1 else x

    def shared(self, share: Tensor) -> Tensor:
        """A sum over ranks of which this rank knows its share: the value is the whole, the gradient the share's."""
        if self.world == 1:
            return share
        whole = share.detach().clone()
        dist.all_reduce(whole)
        return share + (whole - share.detach())

    def groups(self, count: int, group_id: Tensor | None, valid: Tensor | None, device: torch.device) -> Groups:
        """Sort the valid ones of `count` groups here, and of all elsewhere. Raises ValueError, on all ranks, without any."""
        first = self.first
        id_B = torch.arange(first, first + count, device=device) if group_id is None else group_id
        valid_B = torch.ones(count, dtype=torch.bool, device=device) if valid is None else valid
        if self.world > 1:
            id_B, valid_B = self.gather(torch.stack([id_B, valid_B.long()], dim=1)).unbind(1)
        place = valid_B.nonzero().squeeze(1)
        if len(place) == 0:
            raise NoValidGroup
        place = place[id_B[place].argsort(stable=True)]
        mine = (place >= first) & (place < first + count)
        own, foreign = place[mine] - first, place[~mine]

        def exchange(x_own: Tensor) -> Tensor:
            if self.world == 1:
                return x_own[:0]
            x_B = x_own.new_zeros(count, *x_own.shape[1:]).index_copy_(0, own, x_own)
            return self.gather(x_B)[foreign]

        return Groups(own, id_B[place[mine]], id_B[foreign], exchange)

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    def until(self, ready: Callable[[], bool]) -> None:
        """Until it is so on all ranks: for what may take longer than one collective may wait. All ranks must call it."""
        while self.any(not ready())[0]:
            time.sleep(POLL)

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set on any rank. One collective, which all ranks must call."""
        if self.world == 1:
            return list(flags)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag_F = torch.tensor(flags, dtype=torch.int32, device=device)
        dist.all_reduce(flag_F, dist.ReduceOp.MAX)
        return flag_F.bool().tolist()

    def sum(self, *counts: int) -> list[int]:
        """Each count, added up over ranks. One collective, which all ranks must call."""
        if self.world == 1:
            return list(counts)
        count_F = torch.tensor(counts, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(count_F)
        return count_F.tolist()

    @contextmanager
    def agreeing(self) -> Generator[None]:
        """What goes wrong in here on one rank is raised on all. One collective, at the end."""
        failed: Exception | None = None
        try:
            yield
        except (InputError, WorkFailed, OSError) as error:
            failed = error
        every: list[Exception | None] = [failed] * self.world
        if self.world > 1:
            dist.all_gather_object(every, failed)
        if failed := next(filter(None, every), None):
            raise failed

    def for_averaging(self, loss: Tensor) -> Tensor:
        """What to call backward on under DDP: ranks' gradients are shares to be added, and DDP averages them."""
        return loss * self.world


ALONE = Ranks()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together from all ranks where it is sharded: a collective, then, which all ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, known to every rank, on the device of `like` and split as it is."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


@contextmanager
def process_group(batch: int, device: str, timeout_minutes: float = 10,
                  cure: str = "the last checkpoint is whole: start again with `resume`") -> Generator[tuple[Ranks, str]]:
    """Ranks and device of a process that torchrun started; ALONE and `device` of any other.

    When a rank dies, the others end within half a minute and say which. Raises InputError when there are more ranks than
    groups or GPUs, WorkFailed when another rank is gone.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if world == 1:
        yield ALONE, device
        return
    if batch < world:
        raise InputError(f"{world} processes share batches of {batch}: start at most {batch}, or raise optim.batch_size")
    if device.startswith("cuda"):
        if local >= (gpus := torch.cuda.device_count()):
            raise InputError(f"process {local} has no GPU of its own, torch sees {gpus}: lower torchrun's --nproc-per-node")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(minutes=timeout_minutes))
    heartbeat = Heartbeat(dist.get_rank(), world)
    try:
        yield Ranks(dist.get_rank(), world, batch), device
    except Exception as error:
        if _of_communication(error) and (verdict := heartbeat.wait_for_verdict()):
            raise WorkFailed(f"{verdict}; {cure}") from error
        heartbeat.tell(str(error).partition("\n")[0])
        raise
    finally:
        heartbeat.close()
        dist.destroy_process_group()


def _of_communication(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error)


HEADS = "model.auxiliary."  # names in a Step


class Step(nn.Module):
    """All that a step computes with parameters, in one forward as DDP wants it: `model(...)` and `model.similarity()`."""

    def __init__(self, model: nn.Module, bf16: bool = False):
        super().__init__()
        self.model, self.bf16 = model, bf16

    def forward(self, views: list[Tensor], vector_BVA: Tensor, token_BTL: Tensor) -> Embeddings:
        """→ image (B, V, D), text (B, T, D), what auxiliary heads need of each group, temperature (3,), offset (3,)."""
        with torch.autocast(vector_BVA.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.model(views, vector_BVA, token_BTL)
        return *outputs, *self.model.get_submodule("similarity")()


def parallel(step: Step, ranks: Ranks, device: str, sharding: str = "none") -> nn.Module:
    """`step`, whose gradients are averaged over ranks; with "fsdp" its parameters are split over them, one block at a time.

    On CPUs DDP looks for unused parameters only because it then keeps its buckets as they are: rebuilt after the first
    step, they would add in another order than the run that resumes there. Auxiliary heads work on the whole batch, outside
    of DDP's forward: `forward_backward` averages their gradients.
    """
    if ranks.world == 1:
        return step
    if sharding == "fsdp":
        mesh = init_device_mesh(torch.device(device).type, (ranks.world,))
        for block in step.model.get_submodule("image.vit.blocks"), step.model.get_submodule("text.blocks"):
            for layer in block.children():
                fully_shard(layer, mesh=mesh)
        fully_shard(step.model.get_submodule("similarity"), mesh=mesh)  # called beside the model's forward
        fully_shard(step.model, mesh=mesh)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here writes into it
        for method in ("encode_image", "encode_text", "image_features"):
            register_fsdp_forward_method(step.model, method)
        return step
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor is not in torch 2.11
    heads = [name for name, _ in step.named_parameters() if name.startswith(HEADS)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, heads)
    gpu = [torch.device(device)] if device.startswith("cuda") else None
    return DistributedDataParallel(step, gpu, broadcast_buffers=False, find_unused_parameters=gpu is None)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Within, the model neither trains nor keeps gradients nor runs compiled; afterwards it is as it was.

    What was put together of sharded weights is let go: they may have been exchanged for the while.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        if isinstance(model, FSDPModule):
            model.reshard()


@contextmanager
def _unsynchronised(step: nn.Module) -> Generator[None]:
    """Backward passes in here leave each rank's gradient where it is."""
    if isinstance(step, DistributedDataParallel):
        with step.no_sync():
            yield
    elif isinstance(sharded := getattr(step, "model", None), FSDPModule):
        sharded.set_requires_gradient_sync(False)
        yield
        sharded.set_requires_gradient_sync(True)
    else:
        yield


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
        _average_heads(step, ranks)
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
        with nullcontext() if last else _unsynchronised(step):
            _backward(step(*part), [*gradients, *of_similarity] if last else gradients)
    _average_heads(step, ranks)
    return loss.detach()


def _average_heads(step: nn.Module, ranks: Ranks) -> None:
    """What DDP does for all other parameters. One collective where there are auxiliary heads."""
    module = step.module if isinstance(step, DistributedDataParallel) else step
    gradients = [p.grad for name, p in module.named_parameters() if name.startswith(HEADS) and p.grad is not None]
    if ranks.world > 1 and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(averaged.view_as(gradient) / ranks.world)


def _backward(outputs: Embeddings, gradients: list[Tensor]) -> None:
    wanted = [(x, g) for x, g in zip(outputs, gradients, strict=False) if x.requires_grad]
    torch.autograd.backward([x for x, _ in wanted], [g for _, g in wanted])


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
