"""A model on several ranks: DDP and its scale, FSDP2 and its shards. B groups on this rank, V views, T texts, D embedding."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed import Ranks

Embeddings = tuple[Tensor, ...]  # image (B, V, D), text (B, T, D), more of each group, temperature (3,), offset (3,)
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
def unsynchronised(step: nn.Module) -> Generator[None]:
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


def average_heads(step: nn.Module, ranks: Ranks) -> None:
    """What DDP does for all other parameters. One collective where there are auxiliary heads."""
    module = step.module if isinstance(step, DistributedDataParallel) else step
    gradients = [p.grad for name, p in module.named_parameters() if name.startswith(HEADS) and p.grad is not None]
    if ranks.world > 1 and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(averaged.view_as(gradient) / ranks.world)


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
