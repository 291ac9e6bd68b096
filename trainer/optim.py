"""AdamW's parameter groups and the learning rate, in samples (METHOD §8)."""

import math

import torch
from torch import nn

from trainer.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and kernels decay; biases, norms, positions, class tokens, τ and b do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)}
    return [{"params": [p for _, p in named if id(p) in decayed], "weight_decay": weight_decay},
            {"params": [p for _, p in named if id(p) not in decayed], "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; fused on CUDA."""
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, fused=fused)


def learning_rate(config: OptimConfig, samples_seen: int) -> float:
    """The rate of the step that starts at `samples_seen`: linear warm-up, then a cosine that ends at 0."""
    if samples_seen < config.warmup_samples:
        return config.lr * min(1.0, (samples_seen + config.batch_size) / config.warmup_samples)
    left = max(config.samples - config.warmup_samples, 1)
    progress = min((samples_seen - config.warmup_samples) / left, 1.0)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
