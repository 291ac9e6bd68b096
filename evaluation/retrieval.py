"""Image → text and text → image retrieval over a captioned set. N images, T captions, D embedding."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from evaluation.embed import embed_images, embed_texts, placed
from evaluation.results import Measured
from evaluation.statistics import Interval, bootstrap, wilson
from pipeline.evalsets import EvalSet
from trainer.checkpoint import Loaded
from trainer.metrics import KS, ranks, recall_at


@dataclass(frozen=True)
class Pairs:
    """An embedded set: caption i is one of the captions of image `image_of_text_T[i]`."""

    image_ND: Tensor
    text_TD: Tensor
    captions: list[str]
    image_of_text_T: np.ndarray


def embed_pairs(loaded: Loaded, evalset: EvalSet) -> Pairs:
    """Every image and every caption of the set. Raises WorkFailed for an image that cannot be decoded."""
    captions: list[list[str]] = []

    def noted():
        for example in placed(evalset):
            captions.append(example[3])  # type: ignore[arg-type]  # a retrieval set's targets are captions
            yield example

    image_ND = embed_images(loaded, noted())
    texts = [caption for own in captions for caption in own]
    return Pairs(image_ND, embed_texts(loaded, texts), texts,
                 np.repeat(np.arange(len(captions)), [len(own) for own in captions]))


def measure(pairs: Pairs, seed: int) -> list[Measured]:
    """Recall@1, 5, 10 in both directions; recall@1 of each is a main metric."""
    image_N = np.arange(len(pairs.image_ND))
    texts_N = np.bincount(pairs.image_of_text_T)
    found = []
    rank_N = ranks(pairs.image_ND, pairs.text_TD, image_N, pairs.image_of_text_T)
    for k in KS:
        found.append(Measured(f"image_to_text_recall@{k}", len(rank_N), recall_at(rank_N, k),
                              wilson(int((rank_N < k).sum()), len(rank_N)), _chance(texts_N, k), k == 1))
    rank_T = ranks(pairs.text_TD, pairs.image_ND, pairs.image_of_text_T, image_N)
    for k in KS:
        found.append(Measured(f"text_to_image_recall@{k}", len(rank_T), recall_at(rank_T, k),
                              _text_interval(rank_T < k, pairs.image_of_text_T, texts_N, seed),
                              min(k / len(image_N), 1.0), k == 1))
    return found


def _chance(texts_N: np.ndarray, k: int) -> float:
    """Share of images with one of their captions among k drawn at random without putting back."""
    drawn = np.arange(min(k, texts_N.sum()))
    missed_N = np.clip(1 - texts_N[:, None] / (texts_N.sum() - drawn), 0, 1).prod(axis=1)
    return float((1 - missed_N).mean())


def _text_interval(hit_T: np.ndarray, image_of_text_T: np.ndarray, texts_N: np.ndarray, seed: int) -> Interval:
    """Captions of one image are not independent of each other: images are redrawn, with all their captions."""
    if len(hit_T) == len(texts_N):
        return wilson(int(hit_T.sum()), len(hit_T))
    hits_N = np.bincount(image_of_text_T, weights=hit_T)
    return bootstrap(lambda weight_N: float(weight_N @ hits_N / (weight_N @ texts_N)), len(texts_N), seed)
