"""Ranks: the process group and what crosses the wire.

A global batch of N groups over W ranks: rank r holds groups ⌊rN/W⌋ … ⌊(r+1)N/W⌋, in P = ⌈N/W⌉ slots on the wire. B groups
on this rank.
"""

import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor

from pipeline.console import InputError, WorkFailed
from trainer.heartbeat import Heartbeat
from trainer.losses import NoValidGroup

T = TypeVar("T")
POLL = 0.1  # seconds


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

    def told(self, what: T) -> list[T]:
        """What each rank tells, in their order. One collective, which all ranks must call."""
        every = [what] * self.world
        if self.world > 1:
            dist.all_gather_object(every, what)
        return every

    @contextmanager
    def agreeing(self) -> Generator[None]:
        """What goes wrong in here on one rank is raised on all. One collective, at the end."""
        failed: Exception | None = None
        try:
            yield
        except (InputError, WorkFailed, OSError) as error:
            failed = error
        if failed := next(filter(None, self.told(failed)), None):
            raise failed

    def for_averaging(self, loss: Tensor) -> Tensor:
        """What to call backward on under DDP: ranks' gradients are shares to be added, and DDP averages them."""
        return loss * self.world


ALONE = Ranks()


def pick_device(name: str, setting: str = "run.device=") -> str:
    """"auto" is CUDA where there is a GPU. Raises InputError, by what the user sets, for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not kind:
        raise InputError(f"{setting}{name} is no device: set {setting}auto, {setting}cpu, {setting}cuda or {setting}cuda:1")
    if name != "cpu" and not torch.cuda.is_available():
        raise InputError(f"{setting}{name}, but torch sees no CUDA device: set {setting}cpu or {setting}auto")
    if name != "cpu" and int(kind[1] or 0) >= torch.cuda.device_count():
        raise InputError(f"{setting}{name}, but torch sees {torch.cuda.device_count()} CUDA devices: set {setting}auto")
    return name


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
