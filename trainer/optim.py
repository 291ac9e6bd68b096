"""AdamW's parameter groups, the learning rate in samples (METHOD §8), the moving average of the weights."""

import math
import re
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.config import OptimConfig
from trainer.parallel import local, sharded_like

_BLOCK = re.compile(r"^(image\.vit|text)\.blocks\.(\d+)\.")
_TOWER = re.compile(r"^(image\.vit|text)\.")


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Matrices and kernels decay; biases, norms, positions, class tokens, τ and b do not. `lr_scale` is the group's factor.

    A block's factor is layer_decay to the number of blocks above it; of what comes before the blocks, to their number.
    """
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)}
    depths = _depths(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = config.lr_scale.get(name.partition(".")[0], 1.0) * config.layer_decay ** _below_top(name, depths)  # type: ignore[call-overload]
            groups.setdefault((config.weight_decay if id(parameter) in decayed else 0.0, scale), []).append(parameter)
    return [{"params": parameters, "weight_decay": decay, "lr_scale": scale, "lr": config.lr * scale}
            for (decay, scale), parameters in groups.items()]


def _depths(model: nn.Module) -> dict[str, int]:
    """Number of blocks of each tower."""
    depths: dict[str, int] = {}
    for name, _ in model.named_parameters():
        if match := _BLOCK.match(name):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    return depths


def _below_top(name: str, depths: dict[str, int]) -> int:
    """How many blocks lie between a parameter and its tower's output; 0 outside the towers and for the last norm."""
    if match := _BLOCK.match(name):
        return depths[match[1]] - 1 - int(match[2])
    match = _TOWER.match(name)
    return depths[match[1]] if match and not name[match.end():].startswith("norm.") else 0


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; fused on CUDA."""
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """`rate` times each group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def learning_rate(config: OptimConfig, samples_seen: int) -> float:
    """The rate of the step that starts at `samples_seen`: linear warm-up, then a cosine that ends at 0."""
    if samples_seen < config.warmup_samples:
        return config.lr * min(1.0, (samples_seen + config.batch_size) / config.warmup_samples)
    left = max(config.samples - config.warmup_samples, 1)
    progress = min((samples_seen - config.warmup_samples) / left, 1.0)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Average:
    """Exponential moving average of the weights, with a time constant in samples; `saved` is where it stands."""

    def __init__(self, model: nn.Module, samples: int, saved: dict[str, Tensor] | None = None):
        self._samples, self._parameters = samples, dict(model.named_parameters())
        self.weights = {name: sharded_like(saved[name], p) if saved else p.detach().clone()
                        for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, samples: int) -> None:
        """After a step of `samples` samples."""
        share = 1 - math.exp(-samples / self._samples)
        for name, parameter in self._parameters.items():
            local(self.weights[name]).lerp_(local(parameter), share)

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Within, the model has these weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            kept = local(parameter).clone()
            local(parameter).copy_(local(self.weights[name]))
            local(self.weights[name]).copy_(kept)
