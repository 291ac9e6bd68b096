"""Does another order of the classes explain the answers better than the one given? N images, C classes.

Sets are easily read with labels in one order and names in another: Pets differs at 36 of 37 places between two popular
loaders, and the paper's Flowers column is near chance. Such a set gives an ordinary-looking low number.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest

from evaluation.catalogue import official_order

SURE = 1e-6  # of the paired test; many orders are tried on many sets
GAIN, FACTOR = 0.05, 1.5  # another order must explain this much more, absolutely and relatively
NEARLY = 0.9

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

    Any order is sought on one half of the images (Hungarian assignment) and believed only when it also explains the
    other half; a named cause that explains nearly as much is preferred.
    """
    if len(label_N) < 2:
        return None
    half_N = np.arange(len(label_N)) % 2 == 0
    found = _best_order(label_N[half_N], said_N[half_N], len(names))
    label_n, said_n = label_N[~half_N], said_N[~half_N]
    cause, order = max(((cause, order_of(names)) for cause, order_of in CAUSES.items()),
                       key=lambda named: float((said_n == named[1][label_n]).mean()))
    if (said_n == order[label_n]).mean() >= NEARLY * (said_n == found[label_n]).mean():
        return _message(label_N, said_N, order, names, cause) if _explains(label_N, said_N, order) else None
    if not _explains(label_n, said_n, found):
        return None
    moved = [(i, int(line)) for i, line in enumerate(found) if i != line and i in label_N]
    pairs = ", ".join(f"label {i} ({names[i]}) looks like {names[line]}" for i, line in moved[:3])
    return _message(label_N, said_N, found, names, f"names and labels were permuted: {pairs}{' …' * (len(moved) > 3)}")


def _best_order(label_N: np.ndarray, said_N: np.ndarray, classes: int) -> Order:
    said_CC = np.zeros((classes, classes))
    np.add.at(said_CC, (label_N, said_N), 1)
    said_CC[np.diag_indices(classes)] += 0.5  # where nothing speaks for a change, none is made
    return linear_sum_assignment(said_CC, maximize=True)[1]


def _explains(label_N: np.ndarray, said_N: np.ndarray, order: Order) -> bool:
    """Whether reading the labels in `order` fits the answers far and surely better (exact McNemar test)."""
    as_is_N, other_N = said_N == label_N, said_N == order[label_N]
    won, lost = int((other_N & ~as_is_N).sum()), int((as_is_N & ~other_N).sum())
    if won <= lost or other_N.mean() < max(as_is_N.mean() + GAIN, FACTOR * as_is_N.mean()):
        return False
    return bool(binomtest(won, won + lost, 0.5, alternative="greater").pvalue < SURE)


def _message(label_N: np.ndarray, said_N: np.ndarray, order: Order, names: Sequence[str], cause: str) -> str:
    moved = int((order != np.arange(len(names))).sum())
    return (f"accuracy {np.mean(said_N == label_N):.1%} would be {np.mean(said_N == order[label_N]):.1%} with {moved} of "
            f"{len(names)} classes in another order; likely cause: {cause}")
