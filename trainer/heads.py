"""f_A and the heads g_I, g_T: from a tower's feature and the augmentation embedding to the shared space (METHOD §3)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.schema import VECTOR_SIZE


class AugmentationEncoder(nn.Module):
    """f_A: augmentation vector → e. MLP 11 → width → width → width with GELU."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(VECTOR_SIZE, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                                    nn.Linear(width, width))

    def forward(self, vector_BA: Float[Tensor, "B 11"]) -> Float[Tensor, "B E"]:
        """(B, 11) → (B, width)."""
        return self.layers(vector_BA)


class ResidualBlock(nn.Module):
    """x ← x + W2·GELU(W1·LN([x ; e])); the hidden width is the tower's own."""

    def __init__(self, width: int, condition: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width + condition), nn.Linear(width + condition, width), nn.GELU(),
                                    nn.Linear(width, width))

    def forward(self, x_BW: Float[Tensor, "B W"], e_BE: Float[Tensor, "B E"] | None) -> Float[Tensor, "B W"]:
        """(B, width), (B, condition) or None → (B, width)."""
        return x_BW + self.layers(_joined(x_BW, e_BE))


def _joined(x_BW: Tensor, e_BE: Tensor | None) -> Tensor:
    return x_BW if e_BE is None else torch.cat([x_BW, e_BE], dim=1)


class ResidualHead(nn.Module):
    """g_I of the paper: `depth` residual blocks that see e, then a linear map to D."""

    def __init__(self, width: int, condition: int, depth: int, dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width, condition) for _ in range(depth))
        self.out = nn.Linear(width, dim)

    def forward(self, h_BW: Float[Tensor, "B W"], e_BE: Float[Tensor, "B E"] | None = None) -> Float[Tensor, "B D"]:
        """h (B, width) and e (B, condition) or None → z (B, D)."""
        for block in self.blocks:
            h_BW = block(h_BW, e_BE)
        return self.out(h_BW)


class MlpHead(nn.Module):
    """`depth` linear layers with GELU between them on [h ; e]; depth 1 is the linear head.

    Layers before a GELU start as He et al. (ICCV 2015) have it: from torch's own start six layers map all inputs to one
    direction (cosine 0.999), which training hardly leaves.
    """

    def __init__(self, width: int, condition: int, depth: int, dim: int):
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(depth - 1):
            hidden = nn.Linear(width + condition if number == 0 else width, width)
            nn.init.kaiming_normal_(hidden.weight, nonlinearity="relu")
            nn.init.zeros_(hidden.bias)
            layers += [hidden, nn.GELU()]
        layers.append(nn.Linear(width + condition if depth == 1 else width, dim))
        self.layers = nn.Sequential(*layers)

    def forward(self, h_BW: Float[Tensor, "B W"], e_BE: Float[Tensor, "B E"] | None = None) -> Float[Tensor, "B D"]:
        """h (B, width) and e (B, condition) or None → z (B, D)."""
        return self.layers(_joined(h_BW, e_BE))


HEADS: dict[str, type[ResidualHead] | type[MlpHead]] = {"residual": ResidualHead, "mlp": MlpHead}
