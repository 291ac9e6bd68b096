"""What a run minimises, of the global batch: UniCLIP's loss or a baseline's (METHOD §7), and what the log says of it.

B groups on this rank, V views, T texts, W width of the image tower, H of a projection, D embedding, N groups in all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.schema import Batch
from trainer.auxiliary import SLIP_OUT, Declip, Projection, Slip
from trainer.config import Config
from trainer.diagnostics import diagnose, loss_bounds
from trainer.distributed import Ranks
from trainer.losses import info_nce, precise, unit
from trainer.similarity import comparable_offsets
from trainer.tiles import tiled_loss

SIMCLR_TEMPERATURE = 0.1
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Given:
    """What a loss is computed of. more: what the model gives beside embeddings, for its auxiliary `heads`."""

    config: Config
    ranks: Ranks
    heads: nn.Module | None
    batch: Batch
    image_BVD: Tensor
    text_BTD: Tensor
    more: tuple[Tensor, ...]
    temperature_3: Tensor
    offset_3: Tensor

    @property
    def dtype(self) -> torch.dtype | None:
        """In which precision embeddings travel; their own for None."""
        return torch.bfloat16 if self.config.run.precision == "bf16" else None

    def projected(self, head: Projection, x_BW: Tensor) -> Tensor:
        """The head's output, in the run's precision."""
        with torch.autocast(x_BW.device.type, torch.bfloat16, enabled=self.dtype is not None):
            return head(x_BW, self.ranks)


def uniclip(x: Given) -> Terms:
    """A member of the family over all views and texts."""
    return {"uniclip": tiled_loss(x.config.loss.name, x.image_BVD, x.text_BTD, x.temperature_3, x.offset_3,
                                  x.config.loss.supervision, x.batch.group_id, x.batch.valid, ranks=x.ranks, dtype=x.dtype)}


def clip(x: Given, views: int = 1) -> Terms:
    """Symmetric InfoNCE, the mean over each of the first views with each text."""
    losses = [info_nce(image_BD, text_BD, x.temperature_3[1], x.batch.group_id, x.batch.valid,
                       partial(tiled_loss, ranks=x.ranks, dtype=x.dtype))
              for image_BD in x.image_BVD[:, :views].unbind(1) for text_BD in x.text_BTD.unbind(1)]
    return {"clip": torch.stack(losses).mean()}


def slip(x: Given) -> Terms:
    """CLIP on the weak view, SimCLR on the two strong ones."""
    head, valid = cast(Slip, x.heads).projection, x.batch.valid
    z_B2H = torch.stack([x.projected(head, h_BW[valid]) for h_BW in x.more[0][:, 1:].unbind(1)], dim=1)
    return clip(x) | {"simclr": nt_xent(z_B2H, x.batch.group_id[valid], x.ranks, x.dtype)}


def nt_xent(z_B2H: Tensor, group_id: Tensor, ranks: Ranks, dtype: torch.dtype | None = None) -> Tensor:
    """SimCLR's loss: multi-positive InfoNCE, which has one positive for each anchor where there are two views and no text."""
    z_B2H = precise(z_B2H)
    temperature_3 = z_B2H.new_full((3,), SIMCLR_TEMPERATURE)
    return tiled_loss("multi_positive_infonce", z_B2H, z_B2H[:, :0], temperature_3, torch.zeros_like(temperature_3),
                      "unified", group_id, ranks=ranks, dtype=dtype, valid=torch.ones_like(group_id, dtype=torch.bool))


def declip(x: Given) -> Terms:
    """CLIP of two views and two texts, SimSiam, masked words, nearest neighbours."""
    heads, valid = cast(Declip, x.heads), x.batch.valid
    projected = [x.projected(heads.projection, h_BW[valid]) for h_BW in x.more[0].unbind(1)]
    predicted = [x.projected(heads.prediction, z_BH) for z_BH in projected]
    near_BD = heads.queue.nearest(unit(x.text_BTD[:, 0].detach()))
    return clip(x, 2) | {"simsiam": simsiam(predicted, projected, x.ranks), "masked": masked_words(x.more[1][valid], x.ranks),
                         "neighbour": neighbour(x.image_BVD, near_BD, x.temperature_3[1], x.batch, x.ranks)}


def simsiam(predicted: list[Tensor], projected: list[Tensor], ranks: Ranks) -> Tensor:
    """− mean cosine of each view's prediction and the other's projection, through which no gradient goes."""
    cosine_2B = torch.stack([(unit(p_BH) * unit(z_BH.detach())).sum(1)
                             for p_BH, z_BH in zip(predicted, reversed(projected), strict=True)])
    return ranks.shared(-cosine_2B.sum() / ranks.total(cosine_2B.new_tensor(cosine_2B.numel())))


def masked_words(loss_B2: Tensor, ranks: Ranks) -> Tensor:
    """Mean over the masked words of all groups; of each group the sum and the number of its words is given."""
    return ranks.shared(loss_B2[:, 0].sum() / ranks.total(loss_B2[:, 1].detach().sum()).clamp(min=1))


def neighbour(image_BVD: Tensor, near_BD: Tensor, temperature: Tensor, batch: Batch, ranks: Ranks) -> Tensor:
    """InfoNCE, image → text, from every view to the texts in the queue that are nearest to the groups' own."""
    near_ND = ranks.everyone(near_BD)
    id_N, valid_N = ranks.everyone(torch.stack([batch.group_id, batch.valid.long()], dim=1)).unbind(1)
    own_B = ranks.first + torch.arange(len(near_BD), device=near_BD.device)
    out_BN = ((batch.group_id[:, None] == id_N) | (valid_N == 0)).scatter(1, own_B[:, None], False)
    logit_BVN = (unit(image_BVD) @ near_ND.T / temperature).masked_fill(out_BN[:, None], -torch.inf)
    loss_BV = -logit_BVN.log_softmax(2).take_along_dim(own_B[:, None, None], 2).squeeze(2)
    return ranks.shared(loss_BV[batch.valid].sum() / (valid_N.sum() * loss_BV.shape[1]))


# Name → what it computes of a batch, and the weight of each term.
OBJECTIVES: dict[str, tuple[Callable[[Given], Terms], dict[str, float]]] = {
    "uniclip": (uniclip, {"uniclip": 1.0}),
    "clip": (clip, {"clip": 1.0}),
    "slip": (slip, {"clip": 1.0, "simclr": 1.0}),
    "declip": (declip, {"clip": 0.4, "simsiam": 0.2, "masked": 0.2, "neighbour": 0.2}),
}


class Objective:
    """The loss as `forward_backward` calls it; keeps this rank's embeddings, τ and b of its last step for the log.

    `heads`: the model's auxiliary ones. Embeddings are normalised in float32 whatever the towers' precision.
    """

    image_BVD: Tensor
    text_BTD: Tensor
    temperature_3: Tensor
    offset_3: Tensor

    def __init__(self, config: Config, ranks: Ranks, heads: nn.Module | None = None):
        self._config, self._ranks, self._heads = config, ranks, heads
        self._terms_of, self._weights = OBJECTIVES[config.objective.name]
        self._terms: dict[str, float | Tensor] = {}

    def of(self, batch: Batch) -> Callable[..., Tensor]:
        """The loss of this batch's embeddings."""
        return partial(self, batch)

    def __call__(self, batch: Batch, image_BVD: Tensor, text_BTD: Tensor, *more: Tensor) -> Tensor:
        *features, temperature_3, offset_3 = more
        self.image_BVD, self.text_BTD = image_BVD.detach().float(), text_BTD.detach().float()
        self.temperature_3, self.offset_3 = temperature_3.detach().clone(), offset_3.detach().clone()
        terms = self._terms_of(Given(self._config, self._ranks, self._heads, batch, precise(image_BVD), precise(text_BTD),
                                     tuple(features), temperature_3, offset_3))
        self._terms = {name: term.detach() for name, term in terms.items()}
        return torch.stack([self._weights[name] * term for name, term in terms.items()]).sum()

    def keep(self, batch: Batch) -> None:
        """After an update: what later steps need of this one goes into the queue. Where there is one, a collective."""
        if isinstance(self._heads, Declip):
            told_NX = self._ranks.everyone(torch.cat([unit(self.text_BTD[:, 0]), batch.valid[:, None].float()], dim=1))
            self._heads.queue.push(told_NX[told_NX[:, -1] > 0, :-1])

    def numbers(self, batch: Batch) -> dict[str, Any]:
        """What the log says beside the loss: where it could be, τ and b, and how embeddings of this rank's groups lie."""
        bounds = {name: self._bounds(name) for name in self._weights}
        floor, chance = (sum(self._weights[name] * bound[side] for name, bound in bounds.items()) for side in (0, 1))
        parts = {"terms": {name: float(term) for name, term in self._terms.items()}} if len(self._terms) > 1 else {}
        return {"floor_loss": floor, "chance_loss": chance, **parts, "temperature": self.temperature_3.tolist(),
                "offset": comparable_offsets(self.temperature_3, self.offset_3).tolist(),
                "duplicates": 1 - len(batch.group_id.unique()) / max(len(batch.group_id), 1),
                **diagnose(self.image_BVD, self.text_BTD, self.temperature_3, self.offset_3, batch.group_id, batch.valid)}

    def _bounds(self, term: str) -> tuple[float, float]:
        """Floor and chance of a term; what the queue holds counts for chance as random texts."""
        loss, groups, dim = self._config.loss, self._config.optim.batch_size, self._config.model.dim
        of_two = partial(loss_bounds, "multi_positive_infonce")
        if term == "uniclip":
            views, texts = self.image_BVD.shape[1], self.text_BTD.shape[1]
            return loss_bounds(loss.name, loss.supervision, groups, views, texts, dim, self.temperature_3, self.offset_3)
        if term == "simclr":
            temperature_3 = torch.full_like(self.temperature_3, SIMCLR_TEMPERATURE)
            return of_two("unified", groups, 2, 0, SLIP_OUT, temperature_3, torch.zeros_like(temperature_3))
        if term == "simsiam":
            return -1.0, 0.0
        if term == "masked":
            return 0.0, math.log(cast(Declip, self._heads).words.out.out_features)
        return of_two("separate", groups, 1, 1, dim, self.temperature_3, self.offset_3)
