"""What a step needs in memory: its operations are run at their real sizes, on tensors without contents."""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pipeline.prefetch import PREFETCHED_BATCHES
from pipeline.schema import VECTOR_SIZE
from trainer.config import Config
from trainer.flops import flops_per_sample
from trainer.model import UniCLIP
from trainer.parallel import Step
from trainer.tiles import TILE

CLIP_VOCABULARY = 49_408
# Of trainer.tiles, measured, in float32: rows of embeddings it holds at most, and those it holds beside its tiles.
LOSS_ROWS, ROWS_BESIDE, LOSS_TILES = 4.3, 3, 4


class Live(TorchDispatchMode):
    """Counts the bytes that operations hold while it is active: `now`, and at most so far `peak`. `given` are not counted."""

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}
        for tensor in given:
            self._see(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        if (name := storage._cdata) not in self._known:
            size = storage.nbytes() if counted else 0
            self._known[name] = weakref.finalize(storage, self._gone, name, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, name: int, size: int) -> None:
        del self._known[name]
        self.now -= size


@dataclass(frozen=True)
class Sizes:
    """Of a run: weights by part of the model, trainable ones; FLOPs of a sample; bytes of a checkpoint, and of memory on one
    device by what they are for."""

    weights: dict[str, int]
    trainable: int
    flops: float
    checkpoint: int
    memory: dict[str, int]

    @property
    def fixed(self) -> int:
        """Bytes that no smaller batch saves."""
        return sum(self.memory[name] for name in ("weights", "gradients", "optimizer", "average"))


def sizes_of(config: Config, ranks: int = 1, device: str = "cpu") -> Sizes:
    """Sizes on each of `ranks` devices. Raises what timm and torch raise for a model that cannot be built.

    Activations are those of PyTorch's CPU kernels; a compiled model, and a vocabulary smaller than asked for, need less.
    """
    optim, world = config.optim, ranks if config.run.sharding == "fsdp" else 1
    groups = -(-optim.batch_size // ranks)
    model = _outline(config)
    weights = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    frozen = sum(weights[tower] for tower in config.init.freeze)
    every, trained = 4 * sum(weights.values()), 4 * (sum(weights.values()) - frozen)
    average = every if optim.average_samples else 0
    checkpoint = every + 2 * trained + average
    flops, activations = _towers(config, model, -(-groups // min(optim.accumulation, groups)))
    copies = 2 if ranks > 1 and world == 1 else 1  # DDP's buckets
    memory = {"weights": every // world, "gradients": copies * trained // world, "optimizer": 2 * trained // world,
              "average": average // world, "activations": activations, "loss": loss_bytes(config, groups, device),
              "batches": (PREFETCHED_BATCHES + 2) * 4 * groups * len(config.data.kinds()) * 3 * config.model.image.size ** 2,
              "checkpoint": 0 if device.startswith("cuda") else checkpoint}
    return Sizes(weights, trained // 4, flops, checkpoint, memory)


def _outline(config: Config) -> UniCLIP:
    """The model without contents."""
    text = config.model.text
    with torch.device("meta"):
        model = UniCLIP(config.model, CLIP_VOCABULARY if text.vocabulary == "clip" else text.vocab_size, 2,
                        config.learns_offset, config.objective).recompute(config.run.recompute)
    for tower in config.init.freeze:
        model.get_submodule(tower).requires_grad_(False)
    return model


def _towers(config: Config, model: UniCLIP, groups: int) -> tuple[float, int]:
    """FLOPs of a sample; the most bytes that forward and backward of `groups` hold besides weights, gradients and batch."""
    views, size = len(config.data.kinds()), config.model.image.size
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        flops = flops_per_sample(model, views, config.optim.batch_size, config.objective.texts)
        model.auxiliary = None  # heads that work on the whole batch, after the towers
        batch = ([torch.empty(groups, 3, size, size) for _ in range(views)], torch.empty(groups, views, VECTOR_SIZE),
                 torch.zeros(groups, config.objective.texts, config.model.text.context, dtype=torch.long))
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        given = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        with Live([*given, *batch[0], *batch[1:]]) as live:
            image_BVD, text_BTD, *_ = Step(model, config.run.precision == "bf16")(*batch)
            torch.autograd.backward([image_BVD, text_BTD], [torch.empty_like(image_BVD), torch.empty_like(text_BTD)])
    return flops, live.peak


def loss_bytes(config: Config, groups: int, device: str = "cpu") -> int:
    """What trainer.tiles holds for the `groups` of one of the devices, which gets everybody's embeddings."""
    size, dim = len(config.data.kinds()) + 1, config.model.dim
    tile = min(TILE["cuda" if device.startswith("cuda") else "cpu"], (size - 1) * groups)
    rows, tiles = groups * size * dim, tile * tile
    foreign = 2 * (config.optim.batch_size - groups) * size * dim * (2 if config.run.precision == "bf16" else 4)
    return int(4 * max(LOSS_ROWS * rows, ROWS_BESIDE * rows + LOSS_TILES * tiles)) + foreign


def available(device: str) -> int:
    """Free bytes of the GPU; of this machine and the control group it is in, for the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    free = int(told["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit = (group / "memory.max").read_text(encoding="utf-8").strip() if (group / "memory.max").is_file() else "max"
    return free if limit == "max" else min(free, int(limit) - int((group / "memory.current").read_text(encoding="utf-8")))
