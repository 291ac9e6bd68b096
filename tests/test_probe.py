"""The linear probe against scikit-learn's own minimum, its search by hand, and nearest neighbours by hand."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoded, picture
from sklearn.linear_model import LogisticRegression
from test_cache import stub

from evaluation import probe
from evaluation.cache import Cache
from evaluation.evaluate import Bench, evaluate
from evaluation.probe import EXPONENTS, bisect, held_out
from evaluation.regression import EXACT, Problem
from evaluation.task import Job, Plan
from pipeline.console import InputError
from pipeline.evalsets import open_evalset, write_evalset

SHARED = Path(os.environ.get("UNICLIP_SHARED", "../shared"))


def blobs(seed: int, n: int = 300, width: int = 24, classes: int = 5) -> tuple[torch.Tensor, np.ndarray]:
    """Correlated features of very different scales, around overlapping class centres; the centres are always the same."""
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    centre_CW, mix_WW = fixed.normal(size=(classes, width)), fixed.normal(size=(width, width))
    label_N = rng.integers(0, classes, n)
    h_NW = (0.5 * centre_CW[label_N] + rng.normal(size=(n, width))) @ mix_WW * np.geomspace(1e-2, 10, width) + 5
    return torch.tensor(h_NW, dtype=torch.float32), label_N


@pytest.mark.parametrize("exponent", [-4, -2, 0, 2, 4])
def test_a_fit_is_the_minimum_that_scikit_learn_finds(exponent: int) -> None:
    h_NW, label_N = blobs(0)
    found = Problem(h_NW, label_N, 5, torch.device("cpu")).solve(10.0 ** exponent)
    exact = LogisticRegression(C=10.0 ** -exponent, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(h_NW, label_N)
    test_NW = blobs(1)[0]
    ours, theirs = (torch.softmax(found.logits(test_NW), 1).numpy(), exact.predict_proba(test_NW))
    assert np.abs(ours - theirs).max() < 1e-4 and (ours.argmax(1) == theirs.argmax(1)).all()


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    h_NW, label_N = blobs(2)
    problem = Problem(h_NW, label_N, 5, torch.device("cpu"))
    cold, warm = problem.solve(1.0), problem.solve(1.0, problem.solve(100.0))
    torch.testing.assert_close(cold.logits(h_NW), warm.logits(h_NW), atol=1e-4, rtol=1e-4)


def test_a_class_absent_from_the_fit_and_a_constant_feature_do_no_harm() -> None:
    h_NW, label_N = blobs(3)
    h_NW[:, 0] = 7.0
    found = Problem(h_NW, label_N, 8, torch.device("cpu")).solve(1e-3).logits(h_NW)
    assert torch.isfinite(found).all() and found.argmax(dim=1).max() < 5


def peak_at(best: int):
    """A validation curve with one peak, and what was asked of it."""
    asked: list[tuple[int, int | None]] = []

    def fit(step: int, near: int | None) -> tuple[float, int]:
        asked.append((step, near))
        return 1 - abs(step - best) / 1000, step

    return fit, asked


@pytest.mark.parametrize("best", [0, 1, 7, 40, 41, 48, 95, 96])
def test_bisection_finds_the_peak_in_fifteen_fits(best: int) -> None:
    fit, asked = peak_at(best)
    found, tried = bisect(fit)
    assert found == best and len(asked) == len(tried) <= 15
    assert [step for step, _ in asked[:7]] == [96, 80, 64, 48, 32, 16, 0]
    assert asked[0][1] is None and all(near is not None for _, near in asked[1:])
    assert EXPONENTS[0] == -6 and EXPONENTS[96] == 6 and np.allclose(np.diff(EXPONENTS), 1 / 8)


def test_of_equally_good_steps_the_stronger_penalty_is_taken() -> None:
    assert bisect(lambda step, near: (1.0, None))[0] == 96


def test_held_out_images_are_a_fifth_of_each_class() -> None:
    label_N = np.repeat([0, 1, 2, 3], [50, 10, 5, 1])
    held_N = held_out(label_N, 0)
    assert [int(held_N[label_N == c].sum()) for c in range(4)] == [10, 2, 1, 0]
    assert (held_out(label_N, 0) == held_N).all() and (held_out(label_N, 1) != held_N).any()


def coloured(folder: Path, splits: dict[str, int]) -> Path:
    """Pictures whose class a stub's features show."""
    for number, (split, n) in enumerate(splits.items()):
        write_evalset(folder, split, [(encoded(picture(100 * number + i)), i % 3) for i in range(n)], "classification",
                      ["a", "b", "c"])
    return folder


def test_probes_read_the_splits_they_say(tmp_path: Path) -> None:
    bench = Bench.of(stub(), tmp_path / "r.jsonl")
    with_validation = coloured(tmp_path / "three", {"train": 40, "val": 20, "test": 30})
    without = coloured(tmp_path / "two", {"train": 60, "test": 30})
    for folder, words in ((with_validation, "the validation split"), (without, "20% of train")):
        rows = evaluate("probe", bench, [folder])
        assert words in rows[0]["protocol"] and rows[0]["n"] == 30 and rows[0]["data_sha256"].count("+") == \
            (2 if folder == with_validation else 1)
        exponent, _ = max(rows[0]["details"]["path"], key=lambda tried: (tried[1], tried[0]))  # the best; of equals the largest
        assert rows[0]["details"]["lambda"] == pytest.approx(10**exponent, rel=2e-3)  # told to 3 digits; the next is 33 % away
        assert len(rows[0]["details"]["path"]) <= 15
    with pytest.raises(InputError, match="has no split 'train'"):
        evaluate("knn", bench, [coloured(tmp_path / "one", {"test": 9})])


def test_neighbours_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_h = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]])
    test_h = torch.tensor([[1.0, 0.05], [0.0, 3.0], [-2.0, 0.1], [1.0, 1.02]])
    train_N, test_N = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 2, 0])
    monkeypatch.setattr(probe, "NEIGHBOURS", 3)
    monkeypatch.setattr(probe, "BLOCK", 2)
    monkeypatch.setattr(probe, "_training", lambda job: ((train_h, train_N), None))
    coloured(tmp_path / "set", {"test": 4})
    features = type("F", (), {"h_NW": test_h, "label_N": test_N})
    job = Job(stub(), Plan("d", None, "p", {"test": open_evalset(tmp_path / "set")}), Cache(tmp_path), 0, tmp_path)
    monkeypatch.setattr(Job, "features", lambda self, role: features)
    found = {m.metric: m.value for m in probe.measure_neighbours(job).measured}
    # The last one's three nearest are of classes 1, 1 and 0: wrong.
    assert found["accuracy"] == 3 / 4 and found["mean_per_class_recall"] == pytest.approx((1 / 2 + 1 + 1) / 3)


@pytest.mark.slow
def test_the_whole_protocol_against_scikit_learn_on_photographs(tmp_path: Path, capsys) -> None:
    """CLIP's protocol with scikit-learn's L-BFGS against ours on clothing.tar; Newton's steps say where the minimum is.

    An image of the test split is 1.4e-4 from the border where logits spread by 1.1, so a solver that stops early answers it,
    and even chooses λ, by chance: with its own tolerance scikit-learn's L-BFGS took 10^0.125 on one thread and 10^0.25 on two.
    Ours has to be where Newton's steps end, and three times as fast as that L-BFGS, run as CLIP runs it.
    """
    archive = SHARED / "data/clothing.tar"
    if not archive.exists():
        pytest.skip(f"needs {archive}: set UNICLIP_SHARED to the folder that has data/clothing.tar")
    (train, train_N), (held, held_N), (test, test_N) = _photograph_features(archive, tmp_path)
    whole, whole_N = torch.cat([train, held]), np.concatenate([train_N, held_N])
    begin = time.perf_counter()
    problem = Problem(train, train_N, 10, torch.device("cpu"))

    def ours(step: int, near):
        found = problem.solve(10.0 ** EXPONENTS[step], near)
        return float((found.logits(held).argmax(1).numpy() == held_N).mean()), found

    our_step, our_path = bisect(ours)
    final = Problem(whole, whole_N, 10, torch.device("cpu")).solve(10.0 ** EXPONENTS[our_step], our_path[our_step][1], EXACT)
    our_seconds = time.perf_counter() - begin

    def protocol(dtype: torch.dtype, **options) -> tuple[int, dict[int, float], np.ndarray, float]:
        """λ's step, accuracy at each that was tried, scores of the test images, seconds."""
        train_NW, held_NW, whole_NW, test_NW = (x.to(dtype).numpy() for x in (train, held, whole, test))
        begin = time.perf_counter()

        def theirs(step: int, near):
            model = LogisticRegression(C=10.0 ** -EXPONENTS[step], **options).fit(train_NW, train_N)
            return float(model.score(held_NW, held_N)), None

        step, path = bisect(theirs)
        model = LogisticRegression(C=10.0 ** -EXPONENTS[step], **options).fit(whole_NW, whole_N)
        score_NC = model.decision_function(test_NW)
        return step, {step: accuracy for step, (accuracy, _) in path.items()}, score_NC, time.perf_counter() - begin

    exact_step, exact_path, exact_NC, _ = protocol(torch.float64, solver="newton-cholesky", tol=1e-12, max_iter=200)
    step, _, their_NC, seconds = protocol(torch.float32, max_iter=1000)
    our_NC = final.logits(test).numpy()
    our_accuracy, accuracy, exact_accuracy = (float((score_NC.argmax(1) == test_N).mean())
                                              for score_NC in (our_NC, their_NC, exact_NC))
    our_error, their_error = (np.abs(score_NC - score_NC.mean(1, keepdims=True) - exact_NC).max()
                              for score_NC in (our_NC, their_NC))
    with capsys.disabled():
        print(f"\nprobe: λ 10^{EXPONENTS[our_step]:g}, accuracy {our_accuracy:.4f}, logits to {our_error:.0e}, "
              f"{our_seconds:.1f} s; exact: λ 10^{EXPONENTS[exact_step]:g}, {exact_accuracy:.4f}; L-BFGS of 1,000 steps: "
              f"λ 10^{EXPONENTS[step]:g}, {accuracy:.4f}, logits to {their_error:.0e}, {seconds:.1f} s = "
              f"{seconds / our_seconds:.1f} times ours")
    assert our_step == exact_step and {s: found[0] for s, found in our_path.items()} == exact_path
    assert (our_NC.argmax(1) == exact_NC.argmax(1)).all() and our_error < 1e-4 < their_error
    assert abs(our_accuracy - exact_accuracy) < 0.002 and seconds > 3 * our_seconds


def _photograph_features(archive: Path, tmp_path: Path):
    """[(h, labels)] of train, validation and test, from 8 × 8 pixels: plain, but not useless."""
    import tarfile

    from PIL import Image

    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = next(path.parent for path in tmp_path.rglob("labels.tsv"))
    found = []
    for split in ("train", "validation", "test"):
        examples = list(open_evalset(folder, split).examples())
        import io
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((8, 8), Image.Resampling.BOX),
                                      np.float32).ravel() for _, data, _ in examples]) / 255
        found.append((torch.from_numpy(pixels), np.array([label for *_, label in examples])))
    return found
