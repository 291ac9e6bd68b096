"""How far a number can be trusted: 95 % intervals for shares and for means over dependent or grouped outcomes."""

import math
from collections.abc import Callable

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 1000

Interval = tuple[float, float]


def wilson(hits: float, n: float, z: float = Z95) -> Interval:
    """Wilson's score interval for `hits` of `n` independent outcomes (Wilson 1927). Raises ValueError for n = 0."""
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits of {n} outcomes is no share")
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap(statistic: Callable[[np.ndarray], float], units: int, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Percentile interval of `statistic(weight)`, where weight (units,) says how often each unit was redrawn.

    For what Wilson's interval does not fit: captions that share an image, means over classes. The unit is what was
    sampled independently, an image as a rule.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(np.bincount(rng.integers(0, units, units), minlength=units)) for _ in range(resamples)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(low), float(high)
