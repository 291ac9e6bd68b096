"""What SLIP and DeCLIP train beside the towers and never use afterwards: projections, a word predictor, a queue of texts.

B groups on this rank, W width of a tower, H hidden width, D embedding, L tokens, Q texts in the queue, K masked tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ObjectiveConfig
from trainer.distributed import Ranks
from trainer.losses import precise

SLIP_HIDDEN, SLIP_OUT, DECLIP_HIDDEN = 4096, 256, 1024


class GlobalBatchNorm(nn.Module):
    """Batch norm over the rows of all ranks, always by the batch's own statistics: nothing is kept for evaluation."""

    def __init__(self, width: int, affine: bool = True, epsilon: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias, self.epsilon = nn.Parameter(torch.zeros(width)) if affine else None, epsilon

    def forward(self, x_BH: Tensor, ranks: Ranks) -> Tensor:
        """(B, H) → (B, H), in float32 at least. Every rank must call it, also one without rows."""
        with torch.autocast(x_BH.device.type, enabled=False):
            x_BH = precise(x_BH)
            total_H, count = ranks.total(torch.cat([x_BH.sum(0), x_BH.new_tensor([len(x_BH)])])).split([x_BH.shape[1], 1])
            centred_BH = x_BH - total_H / count
            variance_H = ranks.total(centred_BH.square().sum(0)) / count
            x_BH = centred_BH * (variance_H + self.epsilon).rsqrt()
            return x_BH if self.weight is None or self.bias is None else x_BH * self.weight + self.bias


class Projection(nn.Module):
    """Linear layers with batch norm and ReLU between them; with `normed`, a batch norm after the last one too.

    That one has no parameters, as in SimSiam: what comes after it takes its shift out again.
    """

    def __init__(self, widths: list[int], normed: bool = False):
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in zip(widths[:-2], widths[1:-1], strict=True))
        self.norms = nn.ModuleList(GlobalBatchNorm(width) for width in widths[1:-1])
        self.out = nn.Linear(widths[-2], widths[-1], bias=not normed)
        self.norm = GlobalBatchNorm(widths[-1], affine=False) if normed else None

    def forward(self, x_BW: Tensor, ranks: Ranks) -> Tensor:
        """(B, first width) → (B, last width)."""
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x_BW = F.relu(norm(linear(x_BW), ranks))
        x_BW = self.out(x_BW)
        return self.norm(x_BW, ranks) if self.norm else x_BW


class Words(nn.Module):
    """Which word stood there: a linear map from a text tower's states to the vocabulary."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.out = nn.Linear(width, vocab_size)

    def forward(self, state_BLW: Tensor, token_BL: Tensor, chosen_BL: Tensor) -> Tensor:
        """Σ of the cross entropies of the chosen tokens, and their number → (B, 2), in float32 at least."""
        logit_KX, target_K = precise(self.out(state_BLW[chosen_BL])), token_BL[chosen_BL]
        loss_K = F.cross_entropy(logit_KX, target_K, reduction="none")
        row_K = chosen_BL.nonzero()[:, 0]
        loss_B = loss_K.new_zeros(len(token_BL)).index_add(0, row_K, loss_K)
        return torch.stack([loss_B, chosen_BL.sum(1).to(loss_B)], dim=1)


class Queue(nn.Module):
    """The last Q text embeddings of the global batches, normalised. A checkpoint holds it, an exported model does not."""

    text_QD: Tensor
    pushed: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("text_QD", torch.zeros(size, dim), persistent=False)
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long), persistent=False)

    @torch.no_grad()
    def push(self, text_BD: Tensor) -> None:
        """Put texts in the oldest ones' place."""
        text_BD, size, pushed = text_BD[-len(self.text_QD):], len(self.text_QD), int(self.pushed)
        place_B = (pushed + torch.arange(len(text_BD), device=text_BD.device)) % size
        self.text_QD[place_B] = text_BD.to(self.text_QD)
        self.pushed += len(text_BD)

    @torch.no_grad()
    def nearest(self, text_BD: Tensor) -> Tensor:
        """The nearest text in the queue of each one → (B, D); itself while the queue is empty."""
        filled_QD = self.text_QD[:int(self.pushed)].to(text_BD)
        return filled_QD[(text_BD @ filled_QD.T).argmax(1)] if len(filled_QD) and len(text_BD) else text_BD.detach()


class Slip(nn.Module):
    """SimCLR's projection W → 4096 → 4096 → 256."""

    def __init__(self, config: ObjectiveConfig, image_width: int, text_width: int, vocab_size: int, dim: int):
        super().__init__()
        hidden = config.hidden or SLIP_HIDDEN
        self.projection = Projection([image_width, hidden, hidden, SLIP_OUT])


class Declip(nn.Module):
    """SimSiam's projection W → 1024 → 1024 → 1024 and prediction 1024 → 512 → 1024, the word predictor, the queue."""

    def __init__(self, config: ObjectiveConfig, image_width: int, text_width: int, vocab_size: int, dim: int):
        super().__init__()
        hidden = config.hidden or DECLIP_HIDDEN
        self.projection = Projection([image_width, hidden, hidden, hidden], normed=True)
        self.prediction = Projection([hidden, hidden // 2, hidden])
        self.words = Words(text_width, vocab_size)
        self.queue = Queue(config.queue, dim)


AUXILIARY: dict[str, Callable[..., nn.Module]] = {"slip": Slip, "declip": Declip}


def make_auxiliary(config: ObjectiveConfig, image_width: int, text_width: int, vocab_size: int, dim: int
                   ) -> nn.Module | None:
    """What the objective adds to a model; None where it adds nothing."""
    build = AUXILIARY.get(config.name)
    return build(config, image_width, text_width, vocab_size, dim) if build else None
