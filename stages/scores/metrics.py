"""Scores of a model's probabilities: accuracy, loss, ranking, calibration, and 95% intervals.

If images come in groups, whole groups are resampled: the cluster bootstrap of Field and Welsh (2007,
https://doi.org/10.1111/j.1467-9868.2007.00593.x).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.images.index import Groups

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]

CALIBRATION_BINS = 15
CONFIDENCE = 0.95
RESAMPLES = 2000
# With fewer images or groups, a sign test cannot have p < 0.05.
FEWEST = 6
# Drawn images at once, to limit memory.
_AT_ONCE = 2_000_000


def predicted_labels(probabilities: Probabilities) -> Labels:
    """Return the predicted labels (n,) for probabilities (n, classes); of two classes, 1 from a probability of 0.5."""
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= 0.5).astype(np.int64)
    labels: Labels = probabilities.argmax(axis=1)
    return labels


@dataclass(frozen=True)
class Scores:
    """Scores of one model on the test images. An undefined number is `None`.

    `accuracy`, with its 95% interval by Wilson's score method (https://doi.org/10.1080/01621459.1927.10502953), for
    grouped images at least as wide as that of resampled groups; `balanced_accuracy`: the mean recall of the classes in
    the test set; `loss`: mean log-loss, nats; `auroc`, `average_precision`: for two classes those of class 1, otherwise
    the mean over each class against the rest, where defined; `f1_macro`: the mean over the classes in the test set or
    among the predictions; `brier`: for two classes the mean squared error of the probability of class 1, in [0, 1],
    otherwise the sum over the classes, in [0, 2] (Brier 1950), as in scikit-learn; `ece`: see
    `expected_calibration_error`.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    balanced_accuracy: float
    loss: float
    auroc: float | None
    average_precision: float | None
    f1_macro: float
    brier: float
    ece: float


def score(labels: Labels, probabilities: Probabilities, groups: Groups | None = None) -> Scores:
    """Score one model's probabilities (n, classes) on at least one image; `groups` as `number_groups` returns them."""
    from sklearn.metrics import average_precision_score, log_loss, precision_recall_fscore_support, roc_auc_score

    predicted = predicted_labels(probabilities)
    right = predicted == labels
    numbers = np.arange(probabilities.shape[1])
    _, recall, f1, _ = precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=np.nan)
    low, high = widen(wilson_interval(int(right.sum()), len(labels)), right.astype(np.float64), groups, 0.0)
    ranked = [(labels == label, probabilities[:, label]) for label in (numbers[1:] if len(numbers) == 2 else numbers)]
    precisions = [float(average_precision_score(*one)) for one in ranked if one[0].any()]
    areas = [float(roc_auc_score(*one)) for one in ranked if one[0].any() and not one[0].all()]
    return Scores(
        accuracy=float(right.mean()),
        accuracy_low=low,
        accuracy_high=high,
        balanced_accuracy=float(np.nanmean(recall)),
        loss=float(log_loss(labels, probabilities, labels=numbers)),
        auroc=sum(areas) / len(areas) if areas else None,
        average_precision=sum(precisions) / len(precisions) if precisions else None,
        f1_macro=float(np.nanmean(f1)),
        brier=float(squared_errors(labels, probabilities).mean()),
        ece=expected_calibration_error(right, probabilities.max(axis=1)),
    )


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion by Wilson's score method, without continuity correction."""
    from scipy.stats import binomtest

    interval = binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def expected_calibration_error(right: NDArray[np.bool_], confidences: Floats) -> float:
    """Return the expected calibration error, in [0, 1]; 0 if predictions at 80% are right in 80% of cases.

    The mean over images of the distance of their bin's accuracy from its mean probability (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). `right`, (n,): whether the prediction is right; `confidences`: its probability.
    """
    gaps = np.bincount(confidence_bins(confidences), right - confidences, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(right))


def confidence_bins(confidences: Floats) -> Labels:
    """Return the bin, from 0, of each probability above 0, (n,): 15 of equal width, each with its upper edge."""
    bins: Labels = np.ceil(confidences * CALIBRATION_BINS).astype(np.int64) - 1
    return bins


def squared_errors(labels: Labels, probabilities: Probabilities) -> Floats:
    """Return the squared error of each image, (n,), whose mean is the Brier score (see `Scores`)."""
    classes = probabilities.shape[1]
    errors = (probabilities - (labels[:, None] == np.arange(classes))) ** 2
    added: Floats = errors[:, 1] if classes == 2 else errors.sum(axis=1)
    return added


def sum_groups(values: Floats, groups: Groups | None) -> Floats:
    """Return the sum of `values` (n,) over each group, (groups,); without groups, `values`."""
    return values if groups is None else np.bincount(np.unique(groups, return_inverse=True)[1], values).astype(float)


def draw_counts(units: int, chance: np.random.Generator) -> Iterator[Floats]:
    """Yield the counts of units in 2,000 resamples, (m, units), m resamples at a time."""
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

    Percentiles of the resamples, expanded as in Hesterberg (2015, https://doi.org/10.1080/00031305.2015.1089789), since
    plain percentiles are too narrow with few images.
    """
    from scipy.stats import norm, t

    units = len(sum_groups(values, groups))
    if units < FEWEST:
        return None
    tail = float(norm.cdf(math.sqrt(units / (units - 1)) * t.ppf((1 - CONFIDENCE) / 2, units - 1)))
    low, high = np.quantile(resample_means(values, groups, np.random.default_rng(0)), [tail, 1 - tail]).tolist()
    return low, high


def widen(bounds: tuple[float, float], values: Floats, groups: Groups | None, least: float) -> tuple[float, float]:
    """Return the interval of the mean of `values`, (n,), at least as wide as that of resampled groups.

    `bounds`: the interval without groups; with too few groups, the result is `least` to 1.
    """
    if groups is None:
        return bounds
    low, high = mean_interval(values, groups) or (least, 1.0)
    return min(bounds[0], low), max(bounds[1], high)
