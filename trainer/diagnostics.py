"""Is this normal? Numbers to read beside the loss, all without gradients.

B groups, V views, T texts, S = V + T, D embedding. Averages over pairs of embeddings come from sums of embeddings: none of
them needs the M×M matrix.
"""

import math
from itertools import combinations

import torch
from torch import Tensor

from trainer.losses import NoValidGroup, domain_pairs, formula_of, logits_within, pair_up, unit

UNIFORMITY_SAMPLE = 1024
SERIES = 1000  # terms; enough for τ ≥ 0.01 in any dimension


@torch.no_grad()
def diagnose(image_BVD: Tensor, text_BTD: Tensor, temperature_3: Tensor, offset_3: Tensor, group_id: Tensor | None = None,
             valid: Tensor | None = None) -> dict[str, float | list[float]]:
    """What is said of a batch in the log, by name; lists are in the order image-image, image-text, text-text.

    positive_logit and negative_logit: mean ℓ. hardest_negative_wins: share of groups that another group's text or image
    matches at least as well as their own. effective_rank: how many directions embeddings use, of D. uniformity: 0 where
    all are equal, about −4 where they are spread over the sphere. NaN where there is nothing to average.
    """
    kept = torch.ones(len(image_BVD), dtype=torch.bool, device=image_BVD.device) if valid is None else valid
    if not kept.any():
        raise NoValidGroup
    id_B = (torch.arange(len(image_BVD), device=image_BVD.device) if group_id is None else group_id)[kept]
    z_image_BVD, z_text_BTD = unit(image_BVD[kept]), unit(text_BTD[kept])
    logit_BSS = logits_within(z_image_BVD, z_text_BTD, temperature_3, offset_3)
    numbers = {"positive_logit": _positive_logits(logit_BSS, image_BVD.shape[1]).tolist(),
               "negative_logit": _negative_logits(z_image_BVD, z_text_BTD, temperature_3, offset_3, id_B).tolist(),
               "hardest_negative_wins": _hardest_negative_wins(z_image_BVD, z_text_BTD, id_B).item()}
    for name, z_BD in (("image", z_image_BVD[:, 0]), ("text", z_text_BTD[:, 0] if text_BTD.shape[1] else z_text_BTD[:, :0])):
        if z_BD.numel():
            numbers |= {f"effective_rank_{name}": effective_rank(z_BD).item(), f"uniformity_{name}": uniformity(z_BD).item()}
    return numbers


def _positive_logits(logit_BSS: Tensor, views: int) -> Tensor:
    """Mean over pairs of different embeddings of a group; of an embedding with itself where there are none → (3,)."""
    size = logit_BSS.shape[1]
    domain_SS = domain_pairs(views, size, logit_BSS.device)
    mean_SS, other_SS = logit_BSS.mean(0), ~torch.eye(size, dtype=torch.bool, device=logit_BSS.device)
    return torch.stack([mean_SS[pairs & other_SS if (pairs & other_SS).any() else pairs].mean()
                        for pairs in (domain_SS == domain for domain in range(3))])


def _negative_logits(z_image_BVD: Tensor, z_text_BTD: Tensor, temperature_3: Tensor, offset_3: Tensor, id_B: Tensor
                     ) -> Tensor:
    """Mean over pairs of embeddings of groups with different ids → (3,).

    Σ cos over all pairs is the product of two sums; what equal ids have of it is the same product for each id.
    """
    _, id_B, groups_I = id_B.unique(return_inverse=True, return_counts=True)
    sums, counts = [], []
    for z_BXD in (z_image_BVD.double(), z_text_BTD.double()):
        sums.append(z_BXD.new_zeros(len(groups_I), z_BXD.shape[2]).index_add_(0, id_B, z_BXD.sum(1)))
        counts.append(groups_I.double() * z_BXD.shape[1])
    cosines = []
    for first, second in ((0, 0), (0, 1), (1, 1)):
        total = sums[first].sum(0) @ sums[second].sum(0) - (sums[first] * sums[second]).sum()
        pairs = counts[first].sum() * counts[second].sum() - counts[first] @ counts[second]
        cosines.append(total / pairs if pairs > 0 else total.new_tensor(torch.nan))
    return (torch.stack(cosines) - offset_3) / temperature_3


def _hardest_negative_wins(z_image_BVD: Tensor, z_text_BTD: Tensor, id_B: Tensor) -> Tensor:
    """Between first view and first text, in either direction; between the first two views where there are no texts."""
    pair = [z_image_BVD[:, 0], (z_text_BTD if z_text_BTD.shape[1] else z_image_BVD[:, 1:]).transpose(0, 1)]
    if not len(pair[1]):
        return z_image_BVD.new_tensor(torch.nan)
    first_BD, second_BD = pair[0], pair[1][0]
    own_B = (first_BD * second_BD).sum(1)
    wins_B = torch.zeros(len(own_B), dtype=torch.bool, device=own_B.device)
    for a_BD, b_BD in ((first_BD, second_BD), (second_BD, first_BD)):
        for rows in torch.arange(len(own_B), device=own_B.device).split(UNIFORMITY_SAMPLE):
            others_XB = (a_BD[rows] @ b_BD.T).masked_fill_(id_B[rows, None] == id_B, -torch.inf)
            wins_B[rows] |= others_XB.amax(1) >= own_B[rows]
    return wins_B.double().mean()


def effective_rank(z_BD: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007), between 1 and min(B, D)."""
    spectrum_D = torch.linalg.eigvalsh(z_BD.double().T @ z_BD.double()).clamp(min=0).sqrt()
    share_D = spectrum_D / spectrum_D.sum()
    return torch.special.entr(share_D).sum().exp()


def uniformity(z_BD: Tensor) -> Tensor:
    """log of the mean of exp(−2 · distance²) over pairs of unit vectors (Wang & Isola 2020), of the first 1,024."""
    return torch.pdist(z_BD[:UNIFORMITY_SAMPLE].double()).square().mul(-2).exp().mean().log()


def loss_bounds(name: str, supervision: str, groups: int, views: int, texts: int, width: int, temperature_3: Tensor,
                offset_3: Tensor) -> tuple[float, float]:
    """(floor, chance): between which losses a model learns.

    Chance is a model that knows nothing: independent directions, uniform in `width` dimensions. The floor is one whose
    groups agree perfectly and are as far from each other as that. Λ = log(negatives · E e^ℓ), which is true of many
    negatives and fails where τ is so low that a few of them outweigh the rest, 1/(τ²·width) > 2·log(negatives). For chance,
    cosines within a group are 0 ± 1/√width: a three-point Gauss-Hermite rule in each.
    """
    temperature_3, offset_3 = temperature_3.detach().double(), offset_3.detach().double()
    formula, size, device = formula_of(name, supervision), views + texts, temperature_3.device
    domain_SS = domain_pairs(views, size, device)
    mean_3 = _log_mean_score(width, 1 / temperature_3) - offset_3 / temperature_3
    log_SS = mean_3[domain_SS] + torch.tensor(groups - 1.0, device=device).log()  # of negatives by their place in a group
    columns = [slice(None)] if supervision == "unified" else [slice(views), slice(views, None)]
    log_BSC = torch.stack([log_SS[:, column].logsumexp(1) for column in columns], dim=1)[None]

    def of_cosines(cosine_SS: Tensor) -> float:
        logit_SS = (cosine_SS - offset_3[domain_SS]) / temperature_3[domain_SS]
        return formula(pair_up(logit_SS[None], log_BSC, views)).item()

    cosine_SS = torch.eye(size, dtype=torch.float64, device=device)
    loss = middle = of_cosines(cosine_SS)
    for a, b in combinations(range(size), 2):
        for cosine in (-math.sqrt(3 / width), math.sqrt(3 / width)):
            moved_SS = cosine_SS.clone()
            moved_SS[a, b] = moved_SS[b, a] = cosine
            loss += (of_cosines(moved_SS) - middle) / 6
    return of_cosines(torch.ones_like(cosine_SS)), loss


def _log_mean_score(width: int, k_3: Tensor) -> Tensor:
    """log E e^(k·cos) of a random direction: the series of 0F1(; width/2; k²/4), in logarithms → (3,)."""
    n = torch.arange(SERIES, dtype=torch.float64, device=k_3.device)
    half = torch.tensor(width / 2, dtype=torch.float64, device=k_3.device)
    log_terms = n * (k_3[:, None] ** 2 / 4).log() - torch.lgamma(n + 1) - torch.lgamma(half + n) + torch.lgamma(half)
    return log_terms.logsumexp(1)
