"""The straight line between the weights before and after fine-tuning, and the point on it to keep.

Interpolating the weights of two checkpoints that share their start often beats both (WiSE-FT, Wortsman et al. 2022,
https://arxiv.org/abs/2109.01903). BatchNorm is the same in both, bit for bit, so a point on the line needs no new
statistics.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.images.index import Groups

# Measured fractions of the change, from the start to the end.
ALPHAS = tuple(step / 10 for step in range(11))
# The fraction that is kept if the validation images allow it: docs/recipe.md has the measurements.
_PREFERRED = 0.8
# How many standard errors of the paired difference the lowest loss has to be below that of the start.
_EVIDENCE = 0.25


@dataclass(frozen=True)
class Point:
    """A point on the line: `alpha` is the fraction of the change that is kept, 0 the start and 1 the end.

    `val_loss` is the mean log-loss on the validation images after `temperature`, infinite where a logit is not
    finite; `accuracy` is theirs.
    """

    alpha: float
    val_loss: float
    accuracy: float
    temperature: float


def choose(losses: Sequence[NDArray[np.float64]], groups: Groups | None = None) -> int:
    """Return the position of the point to keep: of those as good as the best, the one nearest to `_PREFERRED`.

    The start is kept if the lowest mean loss is not below its own by at least `_EVIDENCE`. As good as the best are
    points whose mean loss exceeds the lowest by less than a standard error of their paired difference over images or
    groups (the one-standard-error rule, Breiman et al. 1984), and does not exceed that of the start: at rates that are
    too high, much worse weights lie between the start and an end that a few images cannot tell from it. Of two points
    as near to the preferred one, the later is kept.

    `losses`: for each of `ALPHAS`, the loss of each image, (n,); a point with one that is not finite is out. `groups`:
    group numbers, (n,); a group counts as one observation.
    """

    def errors_above(one: int, other: int) -> float:
        """Return how many standard errors of their paired difference a mean loss is above another."""
        excess = losses[one] - losses[other]
        sums = excess - excess.mean()
        sums = sums if groups is None else np.bincount(groups, sums)
        mean, error = float(excess.mean()), math.sqrt((sums**2).sum()) / len(excess)
        return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0

    means = [float(values.mean()) for values in losses]
    usable = [position for position, mean in enumerate(means) if math.isfinite(mean) and mean <= means[0]]
    lowest = min(usable, key=means.__getitem__)
    if errors_above(0, lowest) < _EVIDENCE:
        return 0
    near = [position for position in usable if position == lowest or errors_above(position, lowest) < 1]
    return min(near, key=lambda position: (abs(ALPHAS[position] - _PREFERRED), -position))
