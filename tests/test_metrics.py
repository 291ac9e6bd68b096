"""Metrics against tables computed by hand and against brute force."""

import numpy as np
import pytest
import torch

from trainer import metrics
from trainer.metrics import mean_per_class, ranks, ranks_in, recall_at, retrieval_recalls

# Three images and five captions; image 0 has captions 0 and 1, image 1 has 2 and 3, image 2 has 4.
SCORES = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.3],   # own best 0.9: nothing above          → rank 0
                       [0.7, 0.6, 0.5, 0.4, 0.9],   # own best 0.5: 0.7, 0.6, 0.9 above    → rank 3
                       [0.2, 0.6, 0.1, 0.6, 0.6]])  # own 0.6: two others tie with it      → rank 2
IMAGE_OF_TEXT = np.array([0, 0, 1, 1, 2])
# Columns: 0.9 is the best (0); 0.1 below 0.6, 0.6 (2); 0.5 below 0.8 (1); 0.4 below 0.6 (1); 0.6 below 0.9 (1).
TEXT_RANKS = [0, 2, 1, 1, 1]


def right() -> torch.Tensor:
    return torch.arange(3)[:, None] == torch.from_numpy(IMAGE_OF_TEXT)


def test_ranks_by_hand_with_several_captions_and_ties() -> None:
    assert ranks_in(SCORES, right()).tolist() == [0, 3, 2]
    assert ranks_in(SCORES.T, right().T).tolist() == TEXT_RANKS


def test_recall_by_hand() -> None:
    image_ranks, text_ranks = np.array([0, 3, 2]), np.array(TEXT_RANKS)
    assert [recall_at(image_ranks, k) for k in (1, 2, 3, 4)] == [1 / 3, 1 / 3, 2 / 3, 1.0]
    assert [recall_at(text_ranks, k) for k in (1, 2, 3)] == [0.2, 0.8, 1.0]


def embeddings(seed: int, images: int = 40, texts: int = 130) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image_of_text = np.concatenate([np.arange(images), rng.integers(0, images, texts - images)])
    text = rng.normal(size=(texts, 8)).round(1)
    image = (text[:images] + rng.normal(size=(images, 8))).round(1)
    text[-20:] = text[:20]  # duplicates: exact ties
    return image.astype(np.float32), text.astype(np.float32), image_of_text


def brute(image: np.ndarray, text: np.ndarray, image_of_text: np.ndarray, k: int) -> tuple[float, float]:
    """By sorting, the wrong ones first among equals."""
    unit = [torch.nn.functional.normalize(torch.from_numpy(x), dim=-1) for x in (image, text)]
    scores = (unit[0] @ unit[1].T).numpy()
    found = {}
    for name, table, own in (("i", scores, lambda i, t: image_of_text[t] == i),
                             ("t", scores.T, lambda t, i: image_of_text[t] == i)):
        hits = []
        for query, row in enumerate(table):
            order = sorted(range(len(row)), key=lambda c: (-row[c], own(query, c)))
            hits.append(any(own(query, c) for c in order[:k]))
        found[name] = float(np.mean(hits))
    return found["i"], found["t"]


@pytest.mark.parametrize("seed", range(3))
def test_recalls_equal_brute_force(seed: int) -> None:
    image, text, image_of_text = embeddings(seed)
    found = retrieval_recalls(image, text, image_of_text)
    for k in (1, 5, 10):
        expected = brute(image, text, image_of_text, k)
        assert (found[f"image_to_text_recall@{k}"], found[f"text_to_image_recall@{k}"]) == expected
        assert 0 < expected[0] < 1


def test_blocks_change_nothing_and_torch_equals_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, image_of_text = embeddings(7)
    whole = ranks(image, text, np.arange(40), image_of_text)
    largest = 0
    plain = metrics.ranks_in

    def watched(scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, scores.numel())
        return plain(scores, own)

    monkeypatch.setattr(metrics, "ranks_in", watched)
    monkeypatch.setattr(metrics, "BLOCK_NUMBERS", 3 * len(text))
    blocked = ranks(torch.from_numpy(image), torch.from_numpy(text), torch.arange(40), torch.from_numpy(image_of_text))
    assert blocked.tolist() == whole.tolist() and largest == 3 * len(text)


def test_a_collapsed_or_broken_model_scores_nothing() -> None:
    same, broken = np.ones((20, 4)), np.full((20, 4), np.nan)
    for z in (same, broken):
        assert set(retrieval_recalls(z, z, np.arange(20)).values()) == {0.0}


def test_scale_and_precision_of_the_input_do_not_matter() -> None:
    image, text, image_of_text = embeddings(1)
    doubled = ranks((image * 3.7).astype(np.float64), text * 0.01, np.arange(40), image_of_text)
    assert np.abs(doubled - ranks(image, text, np.arange(40), image_of_text)).max() <= 1  # exact ties may split


def test_a_query_without_a_right_candidate_is_an_error() -> None:
    with pytest.raises(ValueError, match="query 1 has no right candidate: its group 9"):
        ranks(np.eye(2), np.eye(2), np.array([0, 9]), np.array([0, 1]))


def test_accuracy_and_mean_per_class_by_hand() -> None:
    # Class weights are the axes, so the score of a class is the image's coordinate (up to its length).
    image = np.array([[3, 2, 1, 0.0], [1, 3, 2, 0], [1, 2, 3, 0], [2, 3, 1, 0], [1, 1, 0, 0]])
    label = np.array([0, 0, 0, 1, 1])  # ranks: 0, 2, 2, 0, 1 (a tie, against it)
    rank = ranks(image, np.eye(4), label, np.arange(4))
    assert rank.tolist() == [0, 2, 2, 0, 1]
    assert recall_at(rank, 1) == 2 / 5 and recall_at(rank, 2) == 3 / 5 and recall_at(rank, 5) == 1.0
    assert mean_per_class(rank < 1, label) == pytest.approx((1 / 3 + 1 / 2) / 2)  # classes 2 and 3 have no images


def test_nearest_candidates_in_blocks_equal_a_plain_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, _ = embeddings(3)
    cosine = (image / np.linalg.norm(image, axis=1, keepdims=True)) @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T
    monkeypatch.setattr(metrics, "BLOCK_NUMBERS", 3 * len(text))
    found = np.take_along_axis(cosine, metrics.nearest(image, text, 4), axis=1)  # scores: the sets hold exact ties
    np.testing.assert_allclose(found, -np.sort(-cosine, axis=1)[:, :4], atol=1e-6)
    assert metrics.nearest(image, text[:2], 4).shape == (len(image), 2)


def test_images_with_four_to_seven_captions_by_hand() -> None:
    """Three images on the axes; a caption's score for an image is its coordinate. A tie counts against the query."""
    image = np.eye(3)
    text = np.array([[9, 1, 0], [1, 9, 0], [5, 5, 0], [0, 1, 9],  # of image 0: right, of 1's side, tied, of 2's side
                     [1, 8, 0], [0, 9, 1], [1, 0, 9], [8, 1, 0], [2, 9, 0],  # of image 1
                     [0, 1, 9], [0, 2, 9], [9, 0, 1], [1, 0, 8], [3, 0, 9], [0, 3, 9], [0, 9, 4]], float)  # of image 2
    owner = np.repeat([0, 1, 2], [4, 5, 7])
    found = retrieval_recalls(image, text, owner)
    assert found["text_to_image_recall@1"] == (1 + 3 + 5) / 16
    rank = ranks(image, text, np.arange(3), owner)
    # Image 0: its best has cosine 9/√82 and so has one of image 2's captions: a tie. Image 1: its best is 9/√82 too,
    # as is one of image 0's. Image 2: 9/√82, as one of image 0's and one of image 1's.
    assert rank.tolist() == [1, 1, 2] and found["image_to_text_recall@1"] == 0.0 and found["image_to_text_recall@5"] == 1.0
