"""What frozen features are worth: CLIP's linear probe, and nearest neighbours as the cheap check.

N images, W features, C classes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.catalogue import mean_per_class_is_main
from evaluation.outcomes import Ranks
from evaluation.regression import EXACT, Linear, Problem
from evaluation.task import Finding, Job, Plan
from evaluation.zeroshot import scores
from pipeline.console import InputError, track
from pipeline.evalsets import EvalSet, open_evalset, splits_of
from trainer.metrics import ranks_in

EXPONENTS = np.linspace(-6, 6, 97)  # of λ: 96 steps, eight a decade
COARSE = 16  # the first seven points
NEIGHBOURS, NEIGHBOUR_TEMPERATURE, BLOCK = 20, 0.07, 2048
HELD_OUT = 0.2  # of train, where a set has no validation split
VALIDATION = ("validation", "val", "valid")

Scored = tuple[float, Any]  # validation accuracy, whatever was fitted


def plan_linear(evalset: EvalSet, folder: Path, templates: str) -> Plan:
    """Raises InputError when the set has no split to train on."""
    return _plan(evalset, folder, "L-BFGS, λ by bisection over 96 log steps on {}, refit on train + validation")


def plan_neighbours(evalset: EvalSet, folder: Path, templates: str) -> Plan:
    """Raises InputError when the set has no split to train on."""
    return _plan(evalset, folder, f"{NEIGHBOURS} nearest by cosine of h, weights exp(s / {NEIGHBOUR_TEMPERATURE})")


def _plan(evalset: EvalSet, folder: Path, protocol: str) -> Plan:
    present = splits_of(folder)
    if "train" not in present or evalset.split == "train":
        raise InputError(f"evaluation set {folder} has no split 'train' beside {evalset.split!r}: a probe needs one")
    names = ["train", *(name for name in VALIDATION if name in present and name != evalset.split)][:2]
    splits = {"test": evalset} | dict(zip(("train", "validation"), (open_evalset(folder, name) for name in names),
                                          strict=False))
    data = "+".join(split.manifest_sha256 for split in splits.values())
    held_out = "the validation split" if "validation" in splits else f"{HELD_OUT:.0%} of train"
    return Plan(data, None, protocol.format(held_out), splits)


def measure_linear(job: Job) -> Finding:
    """λ is chosen on validation images, the classifier refitted on all but the test images, which are read once."""
    (h_NW, label_N), fit_N = _training(job)
    test = job.features("test")
    classes = int(max(label_N.max(), test.label_N.max())) + 1
    problem = Problem(h_NW[fit_N], label_N[fit_N], classes, job.subject.device)
    held_h_NW, held_N = h_NW[~fit_N], torch.as_tensor(label_N[~fit_N])

    def fit(step: int, near: Linear | None) -> tuple[float, Linear]:
        found = problem.solve(10.0 ** EXPONENTS[step], near)
        return float((found.logits(held_h_NW).argmax(dim=1).cpu() == held_N).double().mean()), found

    step, tried = bisect(fit)
    whole = Problem(h_NW, label_N, classes, job.subject.device)
    final = whole.solve(10.0 ** EXPONENTS[step], tried[step][1], EXACT)
    ranks: Ranks = {"class": (_ranks(final.logits(test.h_NW), test.label_N), test.label_N)}
    return Finding(scores(ranks, classes, job.seed, mean_per_class_is_main(job.plan.splits["test"].name)), ranks,
                   details={"lambda": 10.0 ** EXPONENTS[step],
                            "path": [[round(float(EXPONENTS[s]), 3), round(tried[s][0], 6)] for s in tried]})


def bisect(fit: Callable[[int, Any], Scored]) -> tuple[int, dict[int, Scored]]:
    """CLIP's search: seven points, then the neighbourhood of the best at half the distance, four times over.

    fit(step, near) → (accuracy, fitted), near being what was fitted closest to it. Of equally good steps the one of the
    larger λ. → the best step, and all that was tried in the order of trying (15 fits).
    """
    tried: dict[int, Scored] = {}

    def attempt(step: int) -> None:
        if 0 <= step < len(EXPONENTS) and step not in tried:
            near = min(tried, key=lambda other: abs(other - step), default=None)
            tried[step] = fit(step, None if near is None else tried[near][1])

    for step in track(range(len(EXPONENTS) - 1, -1, -COARSE), "linear probe"):  # strong penalties are quickly solved
        attempt(step)
    distance = COARSE // 2
    while distance:
        best = _best(tried)
        attempt(best + distance)
        attempt(best - distance)
        distance //= 2
    return _best(tried), tried


def _best(tried: dict[int, Scored]) -> int:
    return max(tried, key=lambda step: (tried[step][0], step))


def measure_neighbours(job: Job) -> Finding:
    """Every training image votes for its class by its cosine to the test image, the nearest ones only."""
    (h_NW, label_N), _ = _training(job)
    test = job.features("test")
    classes = int(max(label_N.max(), test.label_N.max())) + 1
    known_NW, one_hot_NC = F.normalize(h_NW, dim=-1), F.one_hot(torch.as_tensor(label_N), classes).float()
    votes = []
    for begin in range(0, len(test.h_NW), BLOCK):
        score_BN = F.normalize(test.h_NW[begin:begin + BLOCK], dim=-1) @ known_NW.T
        best_BK, at_BK = score_BN.topk(min(NEIGHBOURS, len(known_NW)), dim=1)
        weight_BK1 = ((best_BK - 1) / NEIGHBOUR_TEMPERATURE).exp()[..., None]
        votes.append((one_hot_NC[at_BK] * weight_BK1).sum(dim=1))
    ranks: Ranks = {"class": (_ranks(torch.cat(votes), test.label_N), test.label_N)}
    return Finding(scores(ranks, classes, job.seed, mean_per_class_is_main(job.plan.splits["test"].name)), ranks,
                   details={"neighbours": NEIGHBOURS})


def _ranks(score_NC: Tensor, label_N: np.ndarray) -> np.ndarray:
    right_NC = F.one_hot(torch.as_tensor(label_N), score_NC.shape[1]).bool()
    return ranks_in(score_NC.cpu(), right_NC).numpy()


def _training(job: Job) -> tuple[tuple[Tensor, np.ndarray], np.ndarray]:
    """Features and labels of everything but the test split, and which of them to fit on while λ is sought."""
    train = job.features("train")
    if "validation" not in job.plan.splits:
        return (train.h_NW, train.label_N), ~held_out(train.label_N, job.seed)
    held = job.features("validation")
    return ((torch.cat([train.h_NW, held.h_NW]), np.concatenate([train.label_N, held.label_N])),
            np.arange(len(train.label_N) + len(held.label_N)) < len(train.label_N))


def held_out(label_N: np.ndarray, seed: int) -> np.ndarray:
    """(N,) bool: HELD_OUT of each class, drawn at random; a class with one image keeps it for fitting."""
    rng, held_N = np.random.default_rng(seed), np.zeros(len(label_N), bool)
    for label in np.unique(label_N):
        own = rng.permutation(np.flatnonzero(label_N == label))
        held_N[own[:round(HELD_OUT * len(own))]] = True
    return held_N
