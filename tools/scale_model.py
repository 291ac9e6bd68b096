"""A step on W GPUs, in seconds, term by term; docs/scaling.md has the equations.

N groups in the global batch, n = ⌈N/W⌉ of them on a GPU, S = V + T, M = S·N, m = S·n, D embedding, P trainable weights.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.console import InputError
from pipeline.schema import VECTOR_SIZE
from tools.scale_machine import Machine
from trainer.config import Config
from trainer.memory import Sizes, _outline, loss_bytes, sizes_of
from trainer.parallel import Step

BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20  # DDP's
UPDATE_BYTES = 40  # of a weight: AdamW reads four numbers and writes three, clipping reads a gradient twice and writes it
GOOD_ENOUGH = 0.98  # of the highest rate


class _Kernels(TorchDispatchMode):
    """Counts operations that start a kernel: views and bare memory do not."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        free = func.is_view or any(word in func.__name__ for word in ("empty", "unsafe_view"))
        self.count += func.namespace == "aten" and not free
        return func(*args, **(kwargs or {}))


def resized(config: Config, batch: int, accumulation: int | None = None) -> Config:
    """The same run with another batch."""
    parts = config.optim.accumulation if accumulation is None else accumulation
    return config.model_copy(update={"optim": config.optim.model_copy(update={"batch_size": batch, "accumulation": parts})})


class Work:
    """What a configuration asks of GPUs. Raises InputError for an objective that is not modelled."""

    def __init__(self, config: Config):
        if (name := config.objective.name) not in ("uniclip", "clip"):
            raise InputError(f"objective.name = {name!r}: its heads are not modelled: give uniclip or clip")
        self.config, self.dim = config, config.model.dim
        self.members = len(config.data.kinds()) + 1  # S
        self._sizes: dict[tuple[int, int], Sizes] = {}

    def _sized(self, groups: int, ranks: int) -> Sizes:
        """With so many groups on each GPU, taken at once."""
        if (groups, ranks) not in self._sizes:
            self._sizes[groups, ranks] = sizes_of(resized(self.config, max(2, groups * ranks), 1), ranks, "cuda")
        return self._sizes[groups, ranks]

    @cached_property
    def kernels(self) -> int:
        """Of one forward and backward pass without recompute."""
        config = self.config.model_copy(update={"run": self.config.run.model_copy(update={"recompute": False})})
        image, views, texts = config.model.image.size, len(config.data.kinds()), config.objective.texts
        model = _outline(config)
        with FakeTensorMode(allow_non_fake_inputs=True), _Kernels() as seen:
            model = model.to_empty(device="cpu")
            model.auxiliary = None
            seen.count = 0
            image_BVD, text_BTD, *_ = Step(model, True)(
                [torch.empty(2, 3, image, image) for _ in range(views)], torch.empty(2, views, VECTOR_SIZE),
                torch.zeros(2, texts, config.model.text.context, dtype=torch.long))
            torch.autograd.backward([image_BVD, text_BTD], [torch.empty_like(image_BVD), torch.empty_like(text_BTD)])
            return seen.count

    @cached_property
    def tower_flops(self) -> float:
        """Of a sample, forward and backward, heads with them."""
        return self._sized(8, 1).flops - self.loss_flops(8)

    def loss_flops(self, batch: int) -> float:
        """Of a sample, as trainer.flops counts it: the full matrix, thrice."""
        return 6.0 * self.members ** 2 * batch * self.dim

    @property
    def trainable(self) -> int:
        """P."""
        return self._sized(8, 1).trainable

    def memory(self, ranks: int, batch: int) -> float:
        """Bytes that a GPU needs, after trainer.memory. Activations are linear in the groups that it takes at once."""
        config, groups = resized(self.config, batch), -(-batch // ranks)
        part = -(-groups // min(config.optim.accumulation, groups))
        low, high = self._sized(8, 1).memory, self._sized(16, 1).memory
        changing = low["activations"] + (high["activations"] - low["activations"]) * (part - 8) / 8
        fixed = self._sized(8, ranks if config.run.sharding == "fsdp" else min(ranks, 2)).memory
        rest = sum(size for name, size in fixed.items() if name not in ("activations", "loss", "batches"))
        return rest + changing + low["batches"] * groups / 8 + loss_bytes(config, groups, "cuda")


def bus(machine: Machine, ranks: int) -> float:
    """Bytes a second that a ring passes on at its narrowest place: NVLink, or all network cards of a machine together."""
    return machine.nvlink if ranks <= machine.gpus else min(machine.nvlink, machine.gpus * machine.network)


def all_gather(machine: Machine, ranks: int, size: float) -> float:
    """Seconds in which a ring brings everybody `size` bytes, of which each rank has its share."""
    if ranks == 1:
        return 0.0
    machines = -(-ranks // machine.gpus)
    hops = (ranks - machines) * machine.nvlink_hop + (machines - 1) * machine.network_hop
    return ((ranks - 1) / ranks * size / bus(machine, ranks) + hops) * machine.crowding(ranks)


def all_reduce(machine: Machine, ranks: int, size: float, calls: int = 1) -> float:
    """Seconds of `calls` sums of `size` bytes in all: a ring's bytes, and the hops of a ring or a tree, whichever has fewer."""
    if ranks == 1:
        return 0.0
    machines = -(-ranks // machine.gpus)
    tree = (min(ranks, machine.gpus) - 1) * machine.nvlink_hop + math.ceil(math.log2(machines)) * machine.network_hop
    ring = (ranks - machines) * machine.nvlink_hop + (machines - 1) * machine.network_hop
    moved = 2 * (ranks - 1) / ranks * size / bus(machine, ranks)
    return (moved + 2 * calls * min(ring, tree)) * machine.crowding(ranks)


@dataclass(frozen=True)
class Prediction:
    """A step: seconds of each term (they add up to `step`), and of what runs beside it."""

    ranks: int
    batch: int
    terms: dict[str, float]
    beside: dict[str, float]
    flops: float
    peak: float
    memory: float

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.terms.values())

    @property
    def rate(self) -> float:
        """Samples a second of all GPUs."""
        return self.batch / self.step

    @property
    def mfu(self) -> float:
        """As trainer.flops counts it."""
        return self.flops * self.rate / (self.ranks * self.peak)

    @property
    def limits(self) -> list[str]:
        """What the step's time goes to, largest first. While GPUs wait for data, that comes before all else."""
        names = sorted((name for name in self.terms if name != "waiting"), key=lambda name: -self.terms[name])
        slowest = max(self.beside, key=lambda name: self.beside[name])
        return [slowest, *names] if self.terms["waiting"] > 0 else names


def predict(work: Work, machine: Machine, ranks: int, batch: int) -> Prediction:
    """A step with `batch` groups in the global batch."""
    config, groups = work.config, -(-batch // ranks)
    parts, sharded = min(config.optim.accumulation, groups), config.run.sharding == "fsdp" and ranks > 1
    passes = 3 + config.run.recompute + (parts > 1)  # each as long as a forward
    crowding = machine.crowding(ranks)
    towers = work.tower_flops * groups * passes / 3 / machine.towers * crowding
    launches = work.kernels * parts * passes / 3 * machine.launch
    every, own = work.members * batch, work.members * groups
    numbers = 2 if config.run.precision == "bf16" else 4
    kinds = 2 if config.loss.supervision == "separate" else 1
    gathered = sum(all_gather(machine, ranks, size) for size in (16 * batch, numbers * every * work.dim, 4 * kinds * every))
    weights = 4 * work.trainable
    if sharded:  # every pass over the blocks gathers their weights; the last one scatters gradients
        trips = (1 + (parts > 1)) * parts + parts + 1
        travel = trips * all_gather(machine, ranks, weights)
        hidden, last = machine.overlap * towers, 0.0
    else:
        buckets = 1 + max(0, math.ceil((weights - FIRST_BUCKET) / BUCKET))
        travel = all_reduce(machine, ranks, weights, buckets)
        hidden, last = machine.overlap * towers * (2 + config.run.recompute) / passes / parts, travel / buckets
    terms = {"towers": towers, "launches": max(0.0, launches - towers), "host": machine.host * crowding,
             "loss": (6 * every * own - 2 * own ** 2) * work.dim / machine.loss * crowding, "gather": gathered,
             "gradients": max(last, travel - hidden),
             "optimizer": UPDATE_BYTES * work.trainable / (ranks if sharded else 1) / machine.memory_bandwidth * crowding}
    machines = -(-ranks // machine.gpus)
    beside = {"decoding": groups / machine.decode, "storage": batch * machine.sample_bytes / (machines * machine.storage)}
    terms["waiting"] = max(0.0, max(beside.values()) - sum(terms.values()))
    return Prediction(ranks, batch, terms, beside, work.tower_flops + work.loss_flops(batch), machine.peak,
                      work.memory(ranks, batch))


@dataclass(frozen=True)
class Choice:
    """The batch to take, and the smallest that is as good."""

    best: Prediction
    least: int
    refused: int  # the smallest batch that memory refuses, 0 where the cap comes first


def choose(work: Work, machine: Machine, ranks: int, most: int, batch: int = 0) -> Choice:
    """The largest global batch whose rate is GOOD_ENOUGH, of W·2^k up to `most` that fit; or `batch`.

    Raises InputError when no batch fits.
    """
    tried = [batch] if batch else [ranks * 2**k for k in range(most.bit_length()) if ranks * 2**k <= most]
    if not tried or tried[0] < ranks:
        raise InputError(f"{ranks} GPUs, batches of at most {batch or most}: give each a group: raise the batch")
    every = [predict(work, machine, ranks, size) for size in tried]
    fitting = [one for one in every if one.memory <= machine.memory_share * machine.memory]
    if not fitting:
        raise InputError(f"a batch of {tried[0]:,} on {ranks} GPUs needs {every[0].memory / 2**30:,.0f} GiB of each, of "
                         f"{machine.memory_share:.0%} of {machine.memory / 2**30:,.0f}: --set a higher "
                         "optim.accumulation, run.recompute=true or run.sharding=fsdp")
    enough = [one for one in fitting if one.rate >= GOOD_ENOUGH * max(other.rate for other in fitting)]
    return Choice(enough[-1], enough[0].batch, every[len(fitting)].batch if len(fitting) < len(every) else 0)
