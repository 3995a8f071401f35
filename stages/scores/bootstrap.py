"""Means over images drawn again with replacement, and their 95% intervals.

Where images come in groups, whole groups are drawn: the cluster bootstrap of Field and Welsh (2007,
https://doi.org/10.1111/j.1467-9868.2007.00593.x).
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from stages.images.index import Groups

CONFIDENCE = 0.95
RESAMPLES = 2000
# Of fewer images or groups that all agree, a sign test would not have p < 0.05.
FEWEST = 6
# So many drawn images at once, to limit the memory.
_AT_ONCE = 2_000_000

Floats = NDArray[np.float64]


def sum_groups(values: Floats, groups: Groups | None) -> Floats:
    """Return the sum of `values` (n,) over each group, (groups,); `values` where there are none."""
    return values if groups is None else np.bincount(np.unique(groups, return_inverse=True)[1], values).astype(float)


def draw_counts(units: int, chance: np.random.Generator) -> Iterator[Floats]:
    """Yield how often each unit is drawn in 2,000 resamples, (m, units), some resamples at a time."""
    many = max(1, _AT_ONCE // units)
    for first in range(0, RESAMPLES, many):
        draws = range(min(many, RESAMPLES - first))
        counts = [np.bincount(chance.integers(units, size=units), minlength=units) for _ in draws]
        yield np.stack(counts).astype(np.float64)


def resample_means(values: Floats, groups: Groups | None, chance: np.random.Generator) -> Floats:
    """Return the mean of `values` (n,) over the images of each resample, (2,000,)."""
    totals = np.stack([sum_groups(column, groups) for column in (values, np.ones(len(values)))], axis=1)
    sums = np.concatenate([counts @ totals for counts in draw_counts(len(totals), chance)])
    means: Floats = sums[:, 0] / sums[:, 1]
    return means


def mean_interval(values: Floats, groups: Groups | None) -> tuple[float, float] | None:
    """Return the 95% interval of the mean of `values` (n,), `None` with fewer than 6 images, or groups.

    Percentiles of the resamples, expanded as Hesterberg (2015, https://doi.org/10.1080/00031305.2015.1089789) has it:
    plain percentiles of few images are too narrow.
    """
    from scipy.stats import norm, t

    units = len(sum_groups(values, groups))
    if units < FEWEST:
        return None
    tail = float(norm.cdf(math.sqrt(units / (units - 1)) * t.ppf((1 - CONFIDENCE) / 2, units - 1)))
    low, high = np.quantile(resample_means(values, groups, np.random.default_rng(0)), [tail, 1 - tail]).tolist()
    return low, high


def widen(bounds: tuple[float, float], values: Floats, groups: Groups | None, least: float) -> tuple[float, float]:
    """Return an interval at least as wide as that of resampled groups.

    Args:
        bounds: the interval of the mean of `values`, were each image a group of its own.
        values: (n,), from `least` to 1.
        groups: (n,), as `number_groups` returns them.
        least: with too few groups, the interval is from here to 1.
    """
    if groups is None:
        return bounds
    low, high = mean_interval(values, groups) or (least, 1.0)
    return min(bounds[0], low), max(bounds[1], high)
