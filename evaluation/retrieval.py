"""Image → text and text → image retrieval over a captioned set. N images, T captions, D embedding."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.sparse import csr_matrix

from evaluation import examples
from evaluation.outcomes import Ranks, measured
from evaluation.results import Measured
from evaluation.task import Finding, Job, Pairs, Plan
from pipeline.evalsets import EvalSet
from trainer.metrics import KS, ranks, ranks_where, recall_at


def plan(evalset: EvalSet, folder: Path, templates: str) -> Plan:
    """Retrieval has one protocol."""
    return Plan(evalset.manifest_sha256, None, "every caption a query, ties against it", {"test": evalset})


def texts(job: Job) -> list[str]:
    """All captions, image by image."""
    return [caption for own in _captions(job) for caption in own]


def _captions(job: Job) -> list[list[str]]:
    return cast(list[list[str]], job.features("test").targets)


def pairs_of(job: Job) -> Pairs:
    """Every image and every caption of the set."""
    captions, own = texts(job), _captions(job)
    return Pairs(job.features("test").z_ND, job.cache.texts(job.subject, captions), captions,
                 np.repeat(np.arange(len(own)), list(map(len, own))))


def measure(job: Job) -> Finding:
    """Recall@1, 5, 10 in both directions; recall@1 of each is a main metric."""
    pairs = pairs_of(job)
    found = rank_both(pairs)
    return Finding(scores(found, job.seed), found,
                   examples.of_pairs(pairs, found, job.plan.splits["test"], job.seed), _of_shared_captions(pairs))


def _of_shared_captions(pairs: Pairs) -> dict[str, Any]:
    """Where a caption belongs to several images: how many such there are, and the recalls with any of these accepted.

    The rows' own numbers follow CLIP_benchmark, which takes only the caption's own image and the image's own captions.
    """
    text_T = np.unique([" ".join(caption.split()).casefold() for caption in pairs.captions], return_inverse=True)[1]
    images_S = np.bincount(np.unique(np.stack([text_T, pairs.image_of_text_T], axis=1), axis=0)[:, 0])
    shared = int((images_S[text_T] > 1).sum())
    if not shared:
        return {}
    found = rank_merged(pairs, text_T)
    merged = {f"{whose}_to_{other}_recall@{k}": recall_at(found[whose], k)
              for whose, other in (("image", "text"), ("text", "image")) for k in KS}
    return {"shared_captions": shared, "captions_merged": merged,
            "note": f"{shared:,} of {len(text_T):,} captions belong to several images; with equal captions accepted as right "
                    f"(captions merged) recall@1 is {merged['image_to_text_recall@1']:.1%} image → text, "
                    f"{merged['text_to_image_recall@1']:.1%} text → image"}


def rank_merged(pairs: Pairs, text_T: np.ndarray) -> dict[str, np.ndarray]:
    """Ranks where every image with an equal caption is right, and every caption equal to one of the image's own.

    text_T: equal numbers for equal captions.
    """
    has_NS = csr_matrix((np.ones(len(text_T), bool), (pairs.image_of_text_T, text_T)))
    of_SN = has_NS.T.tocsr()
    return {"image": ranks_where(pairs.image_ND, pairs.text_TD,
                                 lambda own: torch.from_numpy(has_NS[own].toarray()[:, text_T])),
            "text": ranks_where(pairs.text_TD, pairs.image_ND, lambda own: torch.from_numpy(of_SN[text_T[own]].toarray()))}


def rank_both(pairs: Pairs) -> Ranks:
    """Ranks of each image's best caption and of each caption's image."""
    image_N = np.arange(len(pairs.image_ND))
    return {"image": (ranks(pairs.image_ND, pairs.text_TD, image_N, pairs.image_of_text_T), image_N),
            "text": (ranks(pairs.text_TD, pairs.image_ND, pairs.image_of_text_T, image_N), pairs.image_of_text_T)}


def scores(found: Ranks, seed: int) -> list[Measured]:
    """The recalls with intervals and chance levels."""
    texts_N = np.bincount(found["text"][1])
    return [*(measured(f"image_to_text_recall@{k}", found, _chance(texts_N, k), k == 1, seed) for k in KS),
            *(measured(f"text_to_image_recall@{k}", found, min(k / len(texts_N), 1.0), k == 1, seed) for k in KS)]


def _chance(texts_N: np.ndarray, k: int) -> float:
    """Share of images with one of their captions among k drawn at random without putting back."""
    drawn = np.arange(min(k, texts_N.sum()))
    missed_N = np.clip(1 - texts_N[:, None] / (texts_N.sum() - drawn), 0, 1).prod(axis=1)
    return float((1 - missed_N).mean())
