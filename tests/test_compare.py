"""Paired comparisons: exact where there is a formula, silent between equals, awake to a planted difference."""

from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, picture
from scipy.stats import binomtest
from test_cache import stub

from evaluation import outcomes
from evaluation.compare import Comparison, compare, holm, paired
from evaluation.evaluate import Bench, evaluate
from evaluation.outcomes import Outcome, measured
from evaluation.statistics import wilson
from pipeline.console import InputError
from pipeline.evalsets import write_evalset

ROW = {"dataset": "d", "metric": "accuracy"}


def hits(share: float, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < share


def test_mcnemar_by_hand() -> None:
    a, b = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool), np.array([1, 1, 0, 1, 1, 1, 1, 0], bool)
    found = paired(*(Outcome(x, np.zeros(8, int), "queries") for x in (a, b)), ROW)
    assert found.p == binomtest(1, 5).pvalue == 0.375 and (found.a, found.b) == (3 / 8, 6 / 8)
    assert found.interval[0] <= 3 / 8 <= found.interval[1] and found.better == "–"


@pytest.mark.parametrize("over", ["queries", "classes", "images"])
def test_a_planted_difference_is_found_and_its_side_named(over: str) -> None:
    group_Q = np.arange(1200) // 3
    a = hits(0.5, 1200, 0)
    b = a | hits(0.1, 1200, 1)
    found = paired(Outcome(a, group_Q, over), Outcome(b, group_Q, over), ROW)
    assert found.p < 1e-3 and found.better == "B" and found.interval[0] > 0
    back = paired(Outcome(b, group_Q, over), Outcome(a, group_Q, over), ROW)
    assert back.better == "A" and back.p == found.p
    same = paired(Outcome(a, group_Q, over), Outcome(a, group_Q, over), ROW)
    assert same.p == 1 and same.interval == (0, 0) and same.better == "–"


@pytest.mark.parametrize("over", ["queries", "classes", "images"])
def test_equal_models_are_rarely_called_different(over: str) -> None:
    """60 pairs of models of equal skill; captions of an image succeed and fail together."""
    group_Q, called = np.arange(180) // 3, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        easy_N = rng.beta(0.5, 0.5, 60)
        a, b = (rng.random(180) < (easy_N[group_Q] + rng.normal(0, 0.3, 60)[group_Q]) for _ in range(2))
        if over == "queries":
            a, b = a[::3], b[::3]
        groups = group_Q[::3] // 6 if over == "queries" else group_Q if over == "images" else np.arange(180) % 6
        if over == "classes":
            a, b = (rng.random(180) < 0.4 for _ in range(2))
        called += paired(Outcome(a, groups, over), Outcome(b, groups, over), ROW).p < 0.05
    assert called <= 8  # 5 % of 60 is 3; 9 or more happen once in 250 times


def test_holm_by_hand() -> None:
    found = [Comparison(ROW, 0, 1, (0, 1), p, "") for p in (0.01, 0.04, 0.03, 0.005, 0.9)]
    assert [c.p for c in holm(found)] == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])


def test_intervals_follow_how_queries_depend_on_each_other() -> None:
    rank_T, image_T = np.arange(60) % 4, np.arange(60) // 5
    own = measured("text_to_image_recall@1", {"text": (rank_T, np.arange(60))}, 0.1, True, 0)
    assert own.interval == wilson(15, 60)
    shared = measured("text_to_image_recall@1", {"text": (rank_T, image_T)}, 0.1, True, 0)
    assert shared.value == own.value == 0.25 and shared.interval != own.interval
    classes = measured("mean_per_class_recall", {"class": (np.array([0, 1, 0, 0]), np.array([0, 0, 0, 2]))}, 0.5, True, 0)
    assert classes.value == pytest.approx((2 / 3 + 1) / 2)  # class 1 has no images


def test_intervals_cover_as_often_as_they_say() -> None:
    """Mean per class over classes of unequal size, and recall over captions that share images: 95 %, by simulation."""
    sizes, skill = np.array([90, 60, 40, 30]), np.array([0.9, 0.6, 0.7, 0.5])
    label_N, covered = np.repeat(np.arange(4), sizes), {"classes": 0, "images": 0}
    for seed in range(150):
        rng = np.random.default_rng(seed)
        rank_N = (rng.random(len(label_N)) >= skill[label_N]).astype(int)
        low, high = measured("mean_per_class_recall", {"class": (rank_N, label_N)}, 0, True, seed).interval
        covered["classes"] += low <= skill.mean() <= high
        rank_T = (rng.random(300) >= np.repeat(rng.beta(0.6, 0.4, 60), 5)).astype(int)
        low, high = measured("text_to_image_recall@1", {"text": (rank_T, np.arange(300) // 5)}, 0, True, seed).interval
        covered["images"] += low <= 0.6 <= high
    assert all(134 <= times <= 149 for times in covered.values()), covered


def test_outcomes_come_back_as_they_were(tmp_path: Path) -> None:
    ranks = {"image": (np.array([0, 5]), np.array([0, 1])), "text": (np.array([1, 0, 2]), np.array([0, 0, 1]))}
    outcomes.store(tmp_path / "x" / "a.npz", ranks)
    back = outcomes.read(tmp_path / "x" / "a.npz")
    assert {name: [v.tolist() for v in pair] for name, pair in back.items()} == {
        name: [v.tolist() for v in pair] for name, pair in ranks.items()}


def test_two_results_files_are_compared_on_what_they_share(tmp_path: Path) -> None:
    pairs = [(encoded(picture(i)), [f"caption {i}", f"other words {i}"]) for i in range(30)]
    write_evalset(tmp_path / "one", "test", pairs, "retrieval")
    write_evalset(tmp_path / "two", "test", pairs[:20], "retrieval")
    for name, sets in (("a", ("one", "two")), ("b", ("one",))):
        evaluate("retrieval", Bench.of(stub(name), tmp_path / name / "results.jsonl"), [tmp_path / s for s in sets])
    found = compare(tmp_path / "a", tmp_path / "b")
    assert [(c.row["dataset"], c.row["metric"]) for c in found] == [("one", "image_to_text_recall@1"),
                                                                   ("one", "text_to_image_recall@1")]
    assert all(c.p == 1 and c.better == "–" for c in found)
    assert len(compare(tmp_path / "a", tmp_path / "b" / "results.jsonl", every=True)) == 6
    (tmp_path / "b" / "results.jsonl").write_text("")
    with pytest.raises(InputError, match="have no number in common"):
        compare(tmp_path / "a", tmp_path / "b")
