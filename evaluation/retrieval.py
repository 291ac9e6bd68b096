"""Image → text and text → image retrieval over a captioned set. N images, T captions, D embedding."""

from pathlib import Path
from typing import cast

import numpy as np

from evaluation import examples
from evaluation.outcomes import Ranks, measured
from evaluation.results import Measured
from evaluation.task import Finding, Job, Pairs, Plan
from pipeline.evalsets import EvalSet
from trainer.metrics import KS, ranks


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
                   examples.of_pairs(pairs, found, job.plan.splits["test"], job.seed))


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
