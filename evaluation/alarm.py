"""Does another order of the classes explain the answers better than the one given? N images, C classes.

Sets are easily read with labels in one order and names in another: Pets differs at 36 of 37 places between two popular
loaders, and the paper's Flowers column is near chance. Such a set gives an ordinary-looking low number.

A class counts once, whatever its number of images. Else a model that answers with one class's name throughout looks like
a good model of a permuted set as soon as another class has more images (Caltech-101: 31 to 800).
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom

from evaluation.catalogue import official_order

GAIN, FACTOR = 0.05, 1.5  # the mean recall that another order must add, in all and as a factor
NEARLY = 0.9  # of the best order's recall: a named cause that reaches it is preferred
SURE = 1e-4  # how often chance may look like this; several orders are tried on many sets
DISTINCT = 0.01  # as SURE, where every class has a name of its own: ten classes give 0.0004
FEW, PLAIN = 8, 0.9  # below so many classes nothing is that sure: there, an order must explain nearly all answers

Order = np.ndarray  # (C,): the line of classnames.txt that label i would mean


def _shifted(by: int) -> Callable[[Sequence[str]], Order]:
    return lambda names: (np.arange(len(names)) + by) % len(names)


def _sorted_by(key: Callable[[str], str]) -> Callable[[Sequence[str]], Order]:
    return lambda names: np.array(sorted(range(len(names)), key=lambda i: key(names[i])), np.int64)


def _as_strings(names: Sequence[str]) -> Order:
    """Folders 1, 10, 100, 2, …: what sorting numbers as text makes of them."""
    return np.array(sorted(range(len(names)), key=lambda i: str(i + 1)))


def _published(names: Sequence[str]) -> Order:
    places = {name: i for i, name in enumerate(names)}
    return np.array([places[name] for name in official_order(names) or names])


CAUSES: dict[str, Callable[[Sequence[str]], Order]] = {
    "a line is missing at the top of classnames.txt, or labels count from 1": _shifted(-1),
    "classnames.txt has a line too many at its top": _shifted(1),
    "labels follow the set's published order, classnames.txt another one": _published,
    "labels follow the names in ASCII order (capitals first), classnames.txt does not": _sorted_by(str),
    "labels follow the names in alphabetical order without regard to case, classnames.txt does not":
        _sorted_by(str.casefold),
    "labels follow folder numbers sorted as text (1, 10, 100, 2 …), classnames.txt follows the numbers": _as_strings,
    "labels follow the numbers, classnames.txt follows folder numbers sorted as text (1, 10, 100, 2 …)":
        lambda names: np.argsort(_as_strings(names)),
    "classnames.txt is in reverse order": lambda names: np.arange(len(names))[::-1],
}


def permuted(label_N: np.ndarray, said_N: np.ndarray, names: Sequence[str]) -> str | None:
    """What is likely wrong with the order of the classes, or None.

    Any order is sought on one half of each class's images (Hungarian assignment) and judged on the other half. A named
    cause that explains nearly as much is preferred.
    """
    half_N, classes = _halves(label_N), len(names)
    found = _best_order(label_N[half_N], said_N[half_N], classes)
    share_CC, held_CC = _shares(label_N, said_N, classes), _shares(label_N[~half_N], said_N[~half_N], classes)
    causes = {cause: order_of(names) for cause, order_of in CAUSES.items()}
    cause = max(causes, key=lambda cause: _recall(held_CC, causes[cause]))
    if _recall(held_CC, causes[cause]) >= NEARLY * _recall(held_CC, found):
        named = _gains(share_CC, causes[cause]) and _agree(share_CC, causes[cause])
        return _message(share_CC, causes[cause], cause) if named else None
    if not (_gains(held_CC, found) and _differ(share_CC)):
        return None
    moved = [(i, int(line)) for i, line in enumerate(found) if i != line and share_CC[i].any()]
    pairs = ", ".join(f"label {i} ({names[i]}) looks like {names[line]}" for i, line in moved[:3])
    return _message(share_CC, found, f"names and labels were permuted: {pairs}{' …' * (len(moved) > 3)}")


def _halves(label_N: np.ndarray) -> np.ndarray:
    """Every other image of each class."""
    half_N = np.zeros(len(label_N), bool)
    by_class_N = np.argsort(label_N, kind="stable")
    half_N[by_class_N] = np.arange(len(label_N)) % 2 == 0
    return half_N


def _shares(label_N: np.ndarray, said_N: np.ndarray, classes: int) -> np.ndarray:
    """(C, C): the share of class i's images that were called class j; zeros where i has no image."""
    said_CC = np.zeros((classes, classes))
    np.add.at(said_CC, (label_N, said_N), 1)
    return said_CC / np.maximum(said_CC.sum(axis=1, keepdims=True), 1)


def _best_order(label_N: np.ndarray, said_N: np.ndarray, classes: int) -> Order:
    share_CC, size_C = _shares(label_N, said_N, classes), np.bincount(label_N, minlength=classes)
    share_CC[np.diag_indices(classes)] += np.where(size_C, 0.5 / np.maximum(size_C, 1), 1e-6)  # no change without a reason
    return linear_sum_assignment(share_CC, maximize=True)[1]


def _recall(share_CC: np.ndarray, order: Order) -> float:
    """Mean over the classes that have images, were label i to mean line order[i]."""
    seen_C = share_CC.any(axis=1)
    return float(share_CC[seen_C, order[seen_C]].mean()) if seen_C.any() else 0.0


def _gains(share_CC: np.ndarray, order: Order) -> bool:
    as_is, other = _recall(share_CC, np.arange(len(order))), _recall(share_CC, order)
    plain = len(order) >= FEW or other >= PLAIN
    return plain and other >= max(as_is + GAIN, FACTOR * as_is)


def _agree(share_CC: np.ndarray, order: Order) -> bool:
    """Whether more classes are mostly called what `order` says than would be if each were called anything."""
    seen_C = share_CC.any(axis=1)
    hits, classes = int((share_CC.argmax(axis=1) == order)[seen_C].sum()), len(order)
    return classes < FEW or float(binom.sf(hits - 1, int(seen_C.sum()), 1 / classes)) < SURE


def _differ(share_CC: np.ndarray) -> bool:
    """Whether the classes are mostly called by more different names than would be if each were called anything.

    A model that sees pictures well and knows few of the words gives every class some name of its own choice. The best
    order explains up to 63 % of that; where the order is wrong and the model is good, hardly two classes share a name.
    The number of different names is judged by its mean and variance (occupancy of C boxes by n balls). Few classes with
    images, of many named, get different names by chance: nothing can be told then.
    """
    seen_C, classes = share_CC.any(axis=1), len(share_CC)
    n, different = int(seen_C.sum()), len(np.unique(share_CC[seen_C].argmax(axis=1)))
    one, two = (1 - 1 / classes) ** n, (1 - 2 / classes) ** n
    mean, variance = classes * (1 - one), classes * one + classes * (classes - 1) * two - (classes * one) ** 2
    bound = mean + 3.7 * max(variance, 0) ** 0.5  # 3.7 σ: SURE, one-sided
    all_differ = float(np.prod(1 - np.arange(n) / classes))  # by chance
    return different >= bound or (different == n and all_differ < DISTINCT)


def _message(share_CC: np.ndarray, order: Order, cause: str) -> str:
    moved = int((order != np.arange(len(order))).sum())
    return (f"mean per-class recall {_recall(share_CC, np.arange(len(order))):.1%} would be {_recall(share_CC, order):.1%} "
            f"with {moved} of {len(order)} classes in another order; likely cause: {cause}")
