"""One tile in PyTorch, on any device. T rows, U columns, D embedding.

Not compiled: on a CPU torch.compile saves a tenth of a step and takes 20 s, on CUDA tiles_triton.py fuses more.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# torch.mm is MKL's, which gives AMD's processors 120 GFLOP/s a core where oneDNN gives 270, to which no public way leads.
# With oneDNN a step in tiles takes 0.28 of the dense loss's time, without it 0.46 (tools.bench_loss, 2,048 groups).
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True)
class Patch:
    """One tile of cos / τ, T rows by U columns, as a backend sees it.

    Ids are given where the tile may hold pairs of one group, or of groups of equal id: these do not take part.
    """

    a_TD: Tensor
    b_UD: Tensor
    scale: float
    id_T: Tensor | None
    id_U: Tensor | None

    def logits(self) -> Tensor:
        """→ (T, U)."""
        return inner(self.a_TD, self.b_UD).mul_(self.scale)

    def fill_excluded_(self, x_TU: Tensor, value: float) -> Tensor:
        """Put `value` in the place of pairs that do not take part."""
        if self.id_T is None or self.id_U is None:
            return x_TU
        return x_TU.masked_fill_(self.id_T[:, None] == self.id_U, value)


@dataclass(frozen=True)
class Softmax:
    """What turns the logits of some rows into their G: Λ with the offset's share, and g = ∂L/∂Λ."""

    shift_T: Tensor
    gradient_T: Tensor


def inner(a_TK: Tensor, b_UK: Tensor) -> Tensor:
    """a · bᵀ of equal precision, in float32 at least → (T, U)."""
    if a_TK.element_size() < 4:
        if a_TK.is_cuda:
            return torch.mm(a_TK, b_UK.T, out_dtype=torch.float32)
        a_TK, b_UK = a_TK.float(), b_UK.float()
    if a_TK.dtype == torch.float32 and a_TK.device.type == "cpu" and _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(a_TK, b_UK, None, "none", [], "")
    return a_TK @ b_UK.T


def log_sums(patch: Patch) -> tuple[Tensor, Tensor]:
    """log Σ exp of each row, and of each column."""
    x_TU = patch.fill_excluded_(patch.logits(), -torch.inf)
    return x_TU.logsumexp(1), x_TU.logsumexp(0)


def weights(patch: Patch, row: Softmax, column: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    """S_tu = G_tu + G_ut with G_ij = g_i · exp(ℓ_ij − Λ_i) → S (T, U), Σ S, Σ S · cos / τ."""
    x_TU = patch.logits()
    s_TU = (x_TU - row.shift_T[:, None]).exp_().mul_(row.gradient_T[:, None])
    s_TU += (x_TU - column.shift_T).exp_().mul_(column.gradient_T)
    patch.fill_excluded_(s_TU, 0.0)
    return s_TU, s_TU.sum(), torch.dot(s_TU.view(-1), x_TU.view(-1))
