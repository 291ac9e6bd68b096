"""Eq. 16: domain-dependent similarity with learnable temperatures and offsets; Eq. 14 as its shared variant."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

DOMAIN_PAIRS = ("image-image", "image-text", "text-text")
TEMPERATURE_FLOOR = 0.01


class Similarity(nn.Module):
    """τ and b of the three domain pairs; ℓ_ij = (cos(z_i, z_j) − b_D) / τ_D.

    kind "domain": three of each (Eq. 16). kind "shared": one of each (Eq. 14).
    The floor is applied in place after the optimizer's step: a clamp in forward has no gradient below it.
    """

    def __init__(self, kind: str = "domain", temperature: float = 0.07, learn_offset: bool = True):
        super().__init__()
        count = {"domain": 3, "shared": 1}[kind]
        self.log_temperature = nn.Parameter(torch.full((count,), math.log(temperature)))
        self.offset = nn.Parameter(torch.zeros(count), requires_grad=learn_offset)

    def forward(self) -> tuple[Float[Tensor, "3"], Float[Tensor, "3"]]:
        """→ temperatures (3,) and offsets (3,) in the order of DOMAIN_PAIRS."""
        return self.log_temperature.exp().expand(3), self.offset.expand(3).clone()  # FSDP frees what a view would see

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep every temperature at or above TEMPERATURE_FLOOR."""
        self.log_temperature.clamp_(min=math.log(TEMPERATURE_FLOOR))


def comparable_offsets(temperature_3: Float[Tensor, "3"], offset_3: Float[Tensor, "3"]) -> Float[Tensor, "3"]:
    """b_D − c·τ_D with c such that the image-text offset is 0: the one free direction removed (METHOD §4) → (3,)."""
    return offset_3 - offset_3[1] / temperature_3[1] * temperature_3
