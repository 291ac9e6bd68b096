"""The alarm names what was done to the order of the classes, and is silent about honest sets."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from evaluation.alarm import permuted
from evaluation.catalogue import classnames

NAMES = [f"thing {letter}" for letter in "qwertyuiopasdfghjklz"]


def answers(label_N: np.ndarray, classes: int, accuracy: float, seed: int = 0) -> np.ndarray:
    """What a model of that accuracy says."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(label_N)) < accuracy, label_N, rng.integers(0, classes, len(label_N)))


@pytest.mark.parametrize("accuracy", [0.0, 0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("classes", [2, 5, 20, 200])
def test_an_honest_set_is_quiet(accuracy: float, classes: int) -> None:
    names = [f"n{i * 7919 % 1000:03d}" for i in range(classes)]
    for seed in range(5):
        label_N = np.random.default_rng(seed).integers(0, classes, 1500)
        assert permuted(label_N, answers(label_N, classes, accuracy, seed), names) is None


def test_an_honest_model_with_favourite_confusions_is_quiet() -> None:
    rng = np.random.default_rng(3)
    label_N = rng.integers(0, 20, 4000)
    said_N = np.where(rng.random(4000) < 0.45, (label_N + 1) % 20, answers(label_N, 20, 0.8))  # often takes one for the next
    assert permuted(label_N, said_N, NAMES) is None


def mistaken(true_N: np.ndarray, names: list[str], wrong: list[str]) -> str | None:
    """The alarm when line i of classnames.txt should be names[i] and is wrong[i]; the model is right 7 times in 10."""
    at = {name: line for line, name in enumerate(wrong)}
    said_N = np.array([at[names[i]] for i in answers(true_N, len(names), 0.7)])
    return permuted(true_N, said_N, wrong)


def test_causes_are_named() -> None:
    label_N = np.random.default_rng(0).integers(0, 20, 1500)
    ascii_sorted = sorted(NAMES)
    mixed = [name.title() if i % 3 else name for i, name in enumerate(sorted(NAMES))]
    as_text = [NAMES[i] for i in sorted(range(20), key=lambda i: str(i + 1))]
    for names, wrong, cause in (
            (NAMES, NAMES[1:] + NAMES[:1], "labels count from 1"), (NAMES, NAMES[-1:] + NAMES[:-1], "a line too many"),
            (NAMES, NAMES[::-1], "reverse order"), (ascii_sorted, NAMES, "names in ASCII order"),
            (sorted(mixed, key=str.casefold), sorted(mixed), "without regard to case"),
            (NAMES, as_text, "labels follow the numbers"), (as_text, NAMES, "numbers sorted as text")):
        found = mistaken(label_N, names, wrong)
        assert found and cause in found, (cause, found)
        assert " of 20 classes in another order" in found


def test_the_published_order_of_flowers_is_recognised() -> None:
    names = list(classnames("flowers102"))
    label_N = np.random.default_rng(1).integers(0, 102, 6149)
    found = mistaken(label_N, names, sorted(names))
    assert found and "the set's published order" in found


def test_any_other_order_is_found_and_described() -> None:
    label_N = np.random.default_rng(2).integers(0, 20, 1500)
    wrong = [NAMES[i] for i in np.random.default_rng(5).permutation(20)]
    found = mistaken(label_N, NAMES, wrong)
    assert found and "names and labels were permuted" in found and "looks like" in found


def caltech(rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.r_[770, 400, 390, 200, np.exp(rng.uniform(np.log(25), np.log(110), 98)).astype(int)])


SIZES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {  # how many images each class has
    "like Caltech-101": caltech,
    "from 1 to 770": lambda rng: np.exp(rng.uniform(0, np.log(770), 100)).astype(int),
    "one giant among dwarfs": lambda rng: rng.permutation(np.r_[2000, np.full(29, 8)]),
    "a long tail": lambda rng: rng.permutation((600 / np.arange(1, 201) + 1).astype(int)),
    "ten, each twice the last": lambda rng: rng.permutation(2 ** np.arange(10)) + 5,
}


def blurred(said_N: np.ndarray, classes: int, purity: float, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(len(said_N)) < purity, said_N, rng.integers(0, classes, len(said_N)))


def favourites(label_N: np.ndarray, classes: int, hubs: int, rng: np.random.Generator) -> np.ndarray:
    """Every class has a favourite answer, one of `hubs` names: what a model says that does not know the words."""
    return rng.choice(classes, hubs, replace=False)[rng.integers(0, hubs, classes)][label_N]


MODELS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "good": lambda label_N, classes, rng: blurred(label_N, classes, 0.8, rng),
    "middling": lambda label_N, classes, rng: blurred(label_N, classes, 0.4, rng),
    "weak": lambda label_N, classes, rng: blurred(label_N, classes, 0.03, rng),
    "collapsed to one": lambda label_N, classes, rng: np.full(len(label_N), rng.integers(classes)),
    "collapsed to six": lambda label_N, classes, rng: blurred(favourites(label_N, classes, 6, rng), classes, 0.9, rng),
    "of few words": lambda label_N, classes, rng: blurred(favourites(label_N, classes, classes, rng), classes, 0.9, rng),
}


def test_unequal_classes_in_order_are_quiet_whatever_the_model() -> None:
    """False alarms: 0 of 600, and 0 of 3,000 in a longer run."""
    false = [(sizes, model, seed) for sizes in SIZES for model in MODELS for seed in range(20)
             if drawn(sizes, model, seed, permuted_names=False)]
    assert not false, f"{len(false)} of {len(SIZES) * len(MODELS) * 20}: {false[:5]}"


@pytest.mark.parametrize(("model", "least"), [("good", 98), ("middling", 85)])
def test_planted_permutations_of_unequal_classes_are_found(model: str, least: int) -> None:
    found = [sizes for sizes in SIZES for seed in range(20) if drawn(sizes, model, seed, permuted_names=True)]
    assert len(found) >= least, f"{len(found)} of {len(SIZES) * 20}: {Counter(found)}"


def drawn(sizes: str, model: str, seed: int, permuted_names: bool) -> str | None:
    """The alarm of that model on that set, its names in order or not."""
    rng = np.random.default_rng(seed)
    label_N = rng.permutation(np.repeat(np.arange(len(size_C := SIZES[sizes](rng))), size_C))
    said_N, order = MODELS[model](label_N, len(size_C), rng), rng.permutation(len(size_C))
    return permuted(label_N, order[said_N] if permuted_names else said_N, [f"n{i:03d}" for i in rng.permutation(len(size_C))])


@pytest.mark.parametrize(("named", "with_images"), [(100, 10), (200, 20), (1000, 20), (1000, 50)])
def test_a_few_classes_of_many_tell_no_order(named: int, with_images: int) -> None:
    """A subset of a set: names of their own come by chance."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        label_N = np.repeat(rng.choice(named, with_images, replace=False), 40)
        said_N = blurred(favourites(label_N, named, named, rng), named, 0.8, rng)
        assert permuted(label_N, said_N, [f"n{i:04d}" for i in range(named)]) is None
