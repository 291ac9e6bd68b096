"""Recall@K and accuracy, as pure functions of embeddings. Q queries, C candidates, D embedding.

Everything is a rank: of a query's best right candidate among the wrong ones, 0 is first. A tie counts against the
query, so that a collapsed model scores 0 and every outcome is right or wrong (Wilson's interval needs that). A
NaN score is a tie. Scores are cosines in fp32.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

KS = (1, 5, 10)
BLOCK_NUMBERS = 2**24  # of scores held at once: 64 MiB

Array = np.ndarray | Tensor


def ranks_in(scores_QC: Tensor, right_QC: Tensor) -> Tensor:
    """(Q,) int64: how many wrong candidates score no lower than the best right one; each row needs a right one."""
    best_Q1 = scores_QC.masked_fill(~right_QC, -torch.inf).amax(dim=1, keepdim=True)
    return (~(scores_QC < best_Q1) & ~right_QC).sum(dim=1)  # "not below" rather than "at least": NaN is never below


def ranks(query_QD: Array, candidate_CD: Array, group_Q: Array, group_C: Array) -> np.ndarray:
    """(Q,) int64 ranks where a candidate is right for a query of the same group, a few rows of scores at a time.

    Images against captions, captions against images and images against classes are all this. Raises ValueError when
    a query has no right candidate at all.
    """
    group_Q, group_C = (torch.as_tensor(group, device=torch.as_tensor(query_QD).device) for group in (group_Q, group_C))
    orphans = ~torch.isin(group_Q, group_C)
    if orphans.any():
        raise ValueError(f"query {int(orphans.nonzero()[0])} has no right candidate: its group "
                         f"{int(group_Q[orphans][0])} is not among the candidates'")
    return ranks_where(query_QD, candidate_CD, lambda own: group_Q[own, None] == group_C)


def ranks_where(query_QD: Array, candidate_CD: Array, right_of: Callable[[slice], Tensor]) -> np.ndarray:
    """(Q,) int64 ranks where `right_of` tells for some rows which candidates are right: (q, C), one or more in each row."""
    query_QD, candidate_CD = _unit(query_QD), _unit(candidate_CD)
    rows = max(1, BLOCK_NUMBERS // len(candidate_CD))
    parts = [slice(at, at + rows) for at in range(0, len(query_QD), rows)]
    return torch.cat([ranks_in(query_QD[own] @ candidate_CD.T, right_of(own)) for own in parts]).cpu().numpy()


def _unit(z_QD: Array) -> Tensor:
    return F.normalize(torch.as_tensor(z_QD).detach().float(), dim=-1)


def recall_at(rank_Q: np.ndarray, k: int) -> float:
    """Share of the queries with a right candidate among the first k; top-k accuracy when candidates are classes."""
    return float((rank_Q < k).mean())


def retrieval_recalls(image_ND: Array, text_TD: Array, image_of_text_T: Array) -> dict[str, float]:
    """Recall@1, 5, 10 in both directions; text i belongs to image `image_of_text_T[i]`, and every text is a query."""
    image_N = torch.arange(len(image_ND))
    ranked = {"image_to_text": ranks(image_ND, text_TD, image_N, image_of_text_T),
              "text_to_image": ranks(text_TD, image_ND, image_of_text_T, image_N)}
    return {f"{direction}_recall@{k}": recall_at(rank_Q, k) for direction, rank_Q in ranked.items() for k in KS}


def ensembled(z_TD: Tensor, classes: int) -> Tensor:
    """(C, D) from the prompts of one class after another: each normalised, averaged, normalised (CLIP's ensembling)."""
    return F.normalize(F.normalize(z_TD.unflatten(0, (classes, -1)), dim=-1).mean(dim=1), dim=-1)


def mean_per_class(hit_N: np.ndarray, label_N: np.ndarray) -> float:
    """Mean over the classes of the share of hits in each; a class without images is left out."""
    labels, index_N = np.unique(np.asarray(label_N), return_inverse=True)
    return float(np.mean(np.bincount(index_N, weights=hit_N, minlength=len(labels)) / np.bincount(index_N)))


def nearest(query_QD: Array, candidate_CD: Array, k: int) -> np.ndarray:
    """(Q, k) int64: the k candidates of highest cosine, best first, a few rows of scores at a time."""
    query_QD, candidate_CD = _unit(query_QD), _unit(candidate_CD)
    rows, k = max(1, BLOCK_NUMBERS // len(candidate_CD)), min(k, len(candidate_CD))
    blocks = [(query_QD[at:at + rows] @ candidate_CD.T).topk(k, dim=1).indices for at in range(0, len(query_QD), rows)]
    return torch.cat(blocks).cpu().numpy()
