"""The loss family of UniCLIP as mathematics: plain, dense, the reference for every faster implementation.

B groups, V views, T texts, S = V + T embeddings of a group (views first), D embedding. Every member is a function of the
logits inside each group and of Λ, the log of the summed scores of an anchor's negatives (METHOD §5). Only Λ needs other
groups, so only Λ has a faster implementation (tiles.py); the formulas are here, once.

All losses take raw embeddings and normalise them themselves, and are means over the anchors of valid groups. A batch
without a valid group has no loss: NoValidGroup, a ValueError.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

SUPERVISIONS = ("unified", "separate")


class NoValidGroup(ValueError):
    """Every group of the global batch is invalid: its loss is undefined."""

    def __init__(self):
        super().__init__("the loss of a batch without a valid group is undefined")


@dataclass(frozen=True)
class Pairs:
    """ℓ within each group, and the Λ against which each pair (anchor, positive) is held."""

    logit_BSS: Tensor
    log_negatives_BSX: Tensor  # X = S, or 1 where an anchor has one Λ for all its positives; −inf without a negative
    views: int

    @property
    def others_SS(self) -> Tensor:
        """True where a positive is not the anchor itself."""
        return ~torch.eye(self.logit_BSS.shape[1], dtype=torch.bool, device=self.logit_BSS.device)

    @property
    def domain_SS(self) -> Tensor:
        """Index of the domain pair, in the order image-image, image-text, text-text."""
        return domain_pairs(self.views, self.logit_BSS.shape[1], self.logit_BSS.device)


def precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.element_size() < 4 else x


def unit(x_BSD: Tensor) -> Tensor:
    """Of length 1, in float32 at least."""
    return F.normalize(precise(x_BSD), dim=-1)


def is_text(views: int, size: int, device: torch.device) -> Tensor:
    """Which of the S embeddings of a group are texts, 0 or 1 → (S,)."""
    return (torch.arange(size, device=device) >= views).long()


def domain_pairs(views: int, size: int, device: torch.device) -> Tensor:
    """Index of the domain pair of two embeddings of a group → (S, S) in 0…2."""
    is_text_S = is_text(views, size, device)
    return is_text_S[:, None] + is_text_S


def _softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), exact in double precision (torch's softplus turns linear above 20); 0 with zero gradient at −inf."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _pairwise(x: Pairs, weight_SS: Tensor) -> Tensor:
    """Mean over anchors of Σ_p w · −log s_ip / (s_ip + Σ_n s_in)."""
    return (weight_SS * _softplus(x.log_negatives_BSX - x.logit_BSS)).sum(2).mean()


def _mp_nce(x: Pairs) -> Tensor:
    size = x.logit_BSS.shape[1]
    views, texts = x.views, max(size - x.views, 1)
    weight_3 = x.logit_BSS.new_tensor([1 / views**2, 1 / (2 * views * texts), 1 / texts**2])
    return _pairwise(x, weight_3[x.domain_SS] / size)


def _mp_nce_unweighted(x: Pairs) -> Tensor:
    return _pairwise(x, torch.ones_like(x.logit_BSS[:1]) / x.logit_BSS.shape[1])


def _multi_positive_infonce(x: Pairs) -> Tensor:
    return _pairwise(x, x.others_SS.to(x.logit_BSS) / max(x.logit_BSS.shape[1] - 1, 1))


def _log_positives(x: Pairs) -> Tensor:
    """log Σ exp over the other embeddings of the anchor's group → (B, S, 1)."""
    return x.logit_BSS.masked_fill(~x.others_SS, -torch.inf).logsumexp(2, keepdim=True)


def _mil_nce(x: Pairs) -> Tensor:
    if x.logit_BSS.shape[1] == 1:  # no positive but the anchor itself
        return 0 * x.logit_BSS.sum()
    return _softplus(x.log_negatives_BSX - _log_positives(x)).mean()


def _supcon(x: Pairs) -> Tensor:
    others = x.logit_BSS.shape[1] - 1
    if not others:
        return 0 * x.logit_BSS.sum()
    denominator_BS1 = torch.logaddexp(x.log_negatives_BSX, _log_positives(x))
    return torch.where(x.others_SS, denominator_BS1 - x.logit_BSS, 0.0).sum(2).mean() / others


FORMULAS: dict[str, Callable[[Pairs], Tensor]] = {
    "mp_nce": _mp_nce,  # Eq. 12
    "mp_nce_unweighted": _mp_nce_unweighted,  # Eq. 11
    "multi_positive_infonce": _multi_positive_infonce,  # Eq. 9
    "mil_nce": _mil_nce,  # Eq. 4
    "supcon": _supcon,
}
SEPARABLE = {"mp_nce", "mp_nce_unweighted", "multi_positive_infonce"}


def formula_of(name: str, supervision: str) -> Callable[[Pairs], Tensor]:
    """The member's formula. Raises ValueError for a supervision that does not exist or is undefined for it."""
    if supervision not in SUPERVISIONS:
        raise ValueError(f"supervision {supervision!r}; known: {', '.join(SUPERVISIONS)}")
    if supervision == "separate" and name not in SEPARABLE:
        raise ValueError("separate supervision is undefined for losses that sum over positives of several domain pairs"
                         f" ({name}); use unified")
    return FORMULAS[name]


def logits_within(z_image_BVD: Tensor, z_text_BTD: Tensor, temperature_3: Tensor, offset_3: Tensor) -> Tensor:
    """Eq. 16 within each group, of normalised embeddings → (B, S, S)."""
    cross_BVT = z_image_BVD @ z_text_BTD.mT
    cosine_BSS = torch.cat([torch.cat([z_image_BVD @ z_image_BVD.mT, cross_BVT], dim=2),
                            torch.cat([cross_BVT.mT, z_text_BTD @ z_text_BTD.mT], dim=2)], dim=1)
    domain_SS = domain_pairs(z_image_BVD.shape[1], cosine_BSS.shape[1], cosine_BSS.device)
    return (cosine_BSS - offset_3[domain_SS]) / temperature_3[domain_SS]


def pair_up(logit_BSS: Tensor, log_negatives_BSC: Tensor, views: int) -> Pairs:
    """C = 1 (unified), or 2 (separate: Λ over the images, and over the texts, among the negatives)."""
    if log_negatives_BSC.shape[2] == 2:
        log_negatives_BSC = log_negatives_BSC[:, :, is_text(views, logit_BSS.shape[1], logit_BSS.device)]
    return Pairs(logit_BSS, log_negatives_BSC, views)


def _masked_logsumexp(logit_BSBX: Tensor, mask_B1B1: Tensor) -> Tensor:
    """log Σ exp over the masked entries of the last two dimensions → (B, S); −inf with zero gradient without any."""
    empty_B1 = ~(mask_B1B1.any(2).squeeze(2) & (logit_BSBX.shape[3] > 0))
    filled = logit_BSBX.masked_fill(~mask_B1B1, -torch.inf).masked_fill(empty_B1[:, :, None, None], 0.0)
    return filled.logsumexp((2, 3)).masked_fill(empty_B1, -torch.inf)


def _log_negatives(z_image_BVD: Tensor, z_text_BTD: Tensor, temperature_3: Tensor, offset_3: Tensor, id_B: Tensor,
                   supervision: str) -> Tensor:
    """Λ over all negatives, or over the images and the texts among them → (B, S, C)."""
    views, z_BSD = z_image_BVD.shape[1], torch.cat([z_image_BVD, z_text_BTD], dim=1)
    domain_S1S = domain_pairs(views, z_BSD.shape[1], z_BSD.device)[:, None]
    z_MD = z_BSD.flatten(0, 1)
    cosine_BSBS = (z_MD @ z_MD.T).view(*z_BSD.shape[:2], *z_BSD.shape[:2])
    logit_BSBS = (cosine_BSBS - offset_3[domain_S1S]) / temperature_3[domain_S1S]
    negative_B1B1 = (id_B[:, None] != id_B)[:, None, :, None]
    columns = [slice(None)] if supervision == "unified" else [slice(views), slice(views, None)]
    return torch.stack([_masked_logsumexp(logit_BSBS[..., c], negative_B1B1) for c in columns], dim=2)


def dense_loss(name: str, image_BVD: Float[Tensor, "B V D"], text_BTD: Float[Tensor, "B T D"],
               temperature_3: Float[Tensor, "3"], offset_3: Float[Tensor, "3"], supervision: str = "unified",
               group_id: Int[Tensor, "B"] | None = None, valid: Bool[Tensor, "B"] | None = None) -> Float[Tensor, ""]:
    """The member `name` of FORMULAS over the whole M×M matrix, M = S·B; half precision is computed in float32.

    Groups of equal `group_id` are neither positives nor negatives of each other; a group that is not `valid` is nothing.
    """
    formula = formula_of(name, supervision)
    group_id = torch.arange(len(image_BVD), device=image_BVD.device) if group_id is None else group_id
    if valid is not None:
        image_BVD, text_BTD, group_id = image_BVD[valid], text_BTD[valid], group_id[valid]
    if len(image_BVD) == 0:
        raise NoValidGroup
    z_image_BVD, z_text_BTD = unit(image_BVD), unit(text_BTD)
    log_negatives_BSC = _log_negatives(z_image_BVD, z_text_BTD, temperature_3, offset_3, group_id, supervision)
    logit_BSS = logits_within(z_image_BVD, z_text_BTD, temperature_3, offset_3)
    return formula(pair_up(logit_BSS, log_negatives_BSC, image_BVD.shape[1]))


LOSSES: dict[str, Callable[..., Tensor]] = {name: partial(dense_loss, name) for name in FORMULAS}


def info_nce(image_BD: Tensor, text_BD: Tensor, temperature: Tensor, group_id: Tensor | None = None,
             valid: Tensor | None = None, loss: Callable[..., Tensor] = dense_loss) -> Tensor:
    """CLIP's symmetric loss, the mean of both directions: multi-positive InfoNCE with one view and one text, separate.

    `loss` is `dense_loss` or `tiles.tiled_loss`, which computes no image-image and text-text tiles here.
    """
    temperature_3 = temperature.reshape(1).expand(3)
    return loss("multi_positive_infonce", image_BD[:, None], text_BD[:, None], temperature_3,
                torch.zeros_like(temperature_3), "separate", group_id, valid)
