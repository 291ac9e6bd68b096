"""The loss family of UniCLIP, dense, as mathematics: the reference for every faster implementation.

B groups, V views, T texts, D embedding, M = (V+T)·B embeddings, ordered group by group: rows of one group are
consecutive. All losses take raw embeddings and normalise them themselves, and are means over the anchors of valid
groups. A batch without a valid group has no loss: ValueError.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SUPERVISIONS = ("unified", "separate")


@dataclass(frozen=True)
class _Logits:
    """Everything a loss needs: ℓ (M, M), domain pair (M, M) in 0…2, the masks of P_i and N_i, anchors, V, T."""

    logit_MM: Tensor
    domain_MM: Tensor
    own_MM: Tensor
    negative_MM: Tensor
    anchor_M: Tensor
    views: int
    texts: int


def _logits(image_BVD: Tensor, text_BTD: Tensor, temperature_3: Tensor, offset_3: Tensor, group_id: Tensor | None,
            valid: Tensor | None) -> _Logits:
    """Eq. 16. Groups of equal id are neither positives nor negatives of each other; invalid groups are neither."""
    groups, views, width = image_BVD.shape
    texts = text_BTD.shape[1]
    device = image_BVD.device
    valid = torch.ones(groups, dtype=torch.bool, device=device) if valid is None else valid.bool()
    group_id = torch.arange(groups, device=device) if group_id is None else group_id
    if not valid.any():
        raise ValueError("the loss of a batch without a valid group is undefined")
    z_MD = F.normalize(torch.cat([image_BVD, text_BTD], dim=1), dim=-1).reshape(-1, width)
    is_text_M = (torch.arange(views + texts, device=device) >= views).long().repeat(groups)
    slot_M = torch.arange(groups, device=device).repeat_interleave(views + texts)
    domain_MM = is_text_M[:, None] + is_text_M[None, :]
    logit_MM = (z_MD @ z_MD.T - offset_3[domain_MM]) / temperature_3[domain_MM]
    valid_M, id_M = valid[slot_M], group_id[slot_M]
    both_MM = valid_M[:, None] & valid_M[None, :]
    return _Logits(logit_MM, domain_MM, (slot_M[:, None] == slot_M[None, :]) & both_MM,
                   (id_M[:, None] != id_M[None, :]) & both_MM, valid_M, views, texts)


def _masked_logsumexp(logit_MM: Tensor, mask_MM: Tensor) -> Tensor:
    """log Σ exp over the mask → (M, 1); −inf with zero gradient for rows without any entry."""
    empty = ~mask_MM.any(1, keepdim=True)
    filled = torch.where(mask_MM, logit_MM, -torch.inf).masked_fill(empty, 0.0)
    return filled.logsumexp(1, keepdim=True).masked_fill(empty, -torch.inf)


def _log_negatives(x: _Logits, supervision: str) -> Tensor:
    """Λ of every pair: over all negatives, or over those of the pair's own domain pair → (M, 1) or (M, M)."""
    if supervision == "unified":
        return _masked_logsumexp(x.logit_MM, x.negative_MM)
    of_domain = [_masked_logsumexp(x.logit_MM, x.negative_MM & (x.domain_MM == d)) for d in range(3)]
    return torch.cat(of_domain, dim=1).gather(1, x.domain_MM)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), exact in double precision (torch's softplus turns linear above 20), 0 with zero gradient at −inf."""
    nothing = x == -torch.inf
    kept = x.masked_fill(nothing, 0.0)
    return torch.logaddexp(kept, torch.zeros_like(kept)).masked_fill(nothing, 0.0)


def _pairwise(x: _Logits, weight_MM: Tensor, positive_MM: Tensor, supervision: str) -> Tensor:
    """Mean over anchors of 1/|P_i| Σ_p w · −log s_ip / (s_ip + Σ_n s_in)."""
    term_MM = weight_MM * _softplus(_log_negatives(x, supervision) - x.logit_MM)
    count_M = positive_MM.sum(1).clamp(min=1)
    per_anchor_M = torch.where(positive_MM, term_MM, 0.0).sum(1) / count_M
    return per_anchor_M.sum() / x.anchor_M.sum()


def _without_self(x: _Logits) -> Tensor:
    return x.own_MM & ~torch.eye(len(x.own_MM), dtype=torch.bool, device=x.own_MM.device)


def _mp_nce(x: _Logits, supervision: str) -> Tensor:
    views, texts = x.views, max(x.texts, 1)
    weight_3 = x.logit_MM.new_tensor([1 / views**2, 1 / (2 * views * texts), 1 / texts**2])
    return _pairwise(x, weight_3[x.domain_MM], x.own_MM, supervision)


def _mp_nce_unweighted(x: _Logits, supervision: str) -> Tensor:
    return _pairwise(x, torch.ones_like(x.logit_MM), x.own_MM, supervision)


def _multi_positive_infonce(x: _Logits, supervision: str) -> Tensor:
    return _pairwise(x, torch.ones_like(x.logit_MM), _without_self(x), supervision)


def _mil_nce(x: _Logits, supervision: str) -> Tensor:
    positive_M1 = _masked_logsumexp(x.logit_MM, _without_self(x))
    lone = positive_M1 == -torch.inf  # V + T = 1: no positive but the anchor itself
    term_M1 = _softplus(_log_negatives(x, supervision) - positive_M1.masked_fill(lone, 0.0))
    return term_M1.masked_fill(lone, 0.0)[x.anchor_M].sum() / x.anchor_M.sum()


def _supcon(x: _Logits, supervision: str) -> Tensor:
    positive_MM = _without_self(x)
    denominator_M1 = _masked_logsumexp(x.logit_MM, positive_MM | x.negative_MM)
    # A lone positive without negatives is its own denominator: 0, as mathematics has it.
    term_MM = torch.where(positive_MM, denominator_M1.masked_fill(denominator_M1 == -torch.inf, 0.0) - x.logit_MM, 0.0)
    return (term_MM.sum(1) / positive_MM.sum(1).clamp(min=1)).sum() / x.anchor_M.sum()


def _loss(formula: Callable[[_Logits, str], Tensor], separable: bool) -> Callable[..., Tensor]:
    def loss(image_BVD: Tensor, text_BTD: Tensor, temperature_3: Tensor, offset_3: Tensor,
             supervision: str = "unified", group_id: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        if supervision not in SUPERVISIONS:
            raise ValueError(f"supervision {supervision!r}; known: {', '.join(SUPERVISIONS)}")
        if supervision == "separate" and not separable:
            raise ValueError("separate supervision is undefined for losses that sum over positives of several domain pairs"
                             " (mil_nce, supcon); use unified")
        return formula(_logits(image_BVD, text_BTD, temperature_3, offset_3, group_id, valid), supervision)

    return loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mp_nce": _loss(_mp_nce, separable=True),  # Eq. 12
    "mp_nce_unweighted": _loss(_mp_nce_unweighted, separable=True),  # Eq. 11
    "multi_positive_infonce": _loss(_multi_positive_infonce, separable=True),  # Eq. 9
    "mil_nce": _loss(_mil_nce, separable=False),  # Eq. 4
    "supcon": _loss(_supcon, separable=False),
}
