"""Zero-shot classification: an image belongs to the class whose prompts it is nearest to. N images, C classes."""

from functools import partial

import numpy as np

from evaluation.embed import embed_images, embed_texts, placed
from evaluation.prompts import class_embeddings
from evaluation.results import Measured
from evaluation.statistics import bootstrap, wilson
from pipeline.console import InputError
from pipeline.evalsets import CLASSNAMES, TEMPLATES, EvalSet
from trainer.checkpoint import Loaded
from trainer.metrics import mean_per_class, ranks, recall_at

# Sets whose papers and every table report the mean over classes, because their classes are of unequal size.
MEAN_PER_CLASS = ("pets", "flowers", "caltech101", "fgvc_aircraft")


def check(evalset: EvalSet) -> None:
    """Raises InputError when the set has no class names or prompts."""
    for found, name in ((evalset.classnames, CLASSNAMES), (evalset.templates, TEMPLATES)):
        if not found:
            raise InputError(f"evaluation set {evalset.shards[0].parent.parent} has no {name}: "
                             "zero-shot classification needs the names of the classes and prompts with {c}")


def measure(loaded: Loaded, evalset: EvalSet, seed: int) -> list[Measured]:
    """Accuracy, accuracy@5 where there are more classes than that, mean per-class recall."""
    labels: list[int] = []

    def noted():
        for example in placed(evalset):
            labels.append(example[3])  # type: ignore[arg-type]  # a classification set's targets are labels
            yield example

    image_ND = embed_images(loaded, noted())
    class_CD = class_embeddings(partial(embed_texts, loaded), evalset.classnames, evalset.templates)
    label_N = np.array(labels)
    return scores(ranks(image_ND, class_CD, label_N, np.arange(len(class_CD))), label_N, len(class_CD), seed,
                  main_is_mean=any(name in evalset.name.lower() for name in MEAN_PER_CLASS))


def scores(rank_N: np.ndarray, label_N: np.ndarray, classes: int, seed: int, main_is_mean: bool) -> list[Measured]:
    """The metrics from the rank of each image's own class."""
    found, n = [], len(rank_N)
    for name, k in (("accuracy", 1), ("accuracy@5", 5)):
        if k < classes:
            found.append(Measured(name, n, recall_at(rank_N, k), wilson(int((rank_N < k).sum()), n), k / classes,
                                  k == 1 and not main_is_mean))
    hit_N = rank_N < 1
    interval = bootstrap(lambda weight_N: _weighted_mean(hit_N, label_N, weight_N), n, seed)
    return [*found, Measured("mean_per_class_recall", n, mean_per_class(hit_N, label_N), interval, 1 / classes,
                             main_is_mean)]


def _weighted_mean(hit_N: np.ndarray, label_N: np.ndarray, weight_N: np.ndarray) -> float:
    """Mean per class when image i was drawn weight_N[i] times; classes not drawn are left out."""
    drawn = np.bincount(label_N, weights=weight_N)
    return float((np.bincount(label_N, weights=weight_N * hit_N)[drawn > 0] / drawn[drawn > 0]).mean())
