"""What a model's probabilities are worth: accuracy and its interval, loss, ranking, calibration."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.images.index import Groups
from stages.scores.bootstrap import CONFIDENCE, widen

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]

CALIBRATION_BINS = 15


def predicted_labels(probabilities: Probabilities) -> Labels:
    """Return the predicted labels (n,) for probabilities (n, classes); of two, 1 from a probability of 0.5 up."""
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= 0.5).astype(np.int64)
    labels: Labels = probabilities.argmax(axis=1)
    return labels


@dataclass(frozen=True)
class Scores:
    """What one model is worth on the test images. A number that is undefined is `None`.

    `accuracy`, and its 95% interval by Wilson's score method (https://doi.org/10.1080/01621459.1927.10502953) from
    `accuracy_low` to `accuracy_high`, where images come in groups at least as wide as that of resampled groups;
    `balanced_accuracy`: the mean recall of the classes that are in the test set;
    `loss`: mean log-loss, nats;
    `auroc` and `average_precision`: of two classes, those of class 1; of more, the mean over each class against all
    others. A class without an image in the test set has neither, and no `auroc` if all images are of that class;
    `f1_macro`: the mean over the classes that are in the test set or among the predictions;
    `brier`: the mean squared error of the probability of class 1, in [0, 1], for two classes; for more, the sum of
    the squared errors over the classes, in [0, 2] (Brier 1950), as scikit-learn's `brier_score_loss` has it;
    `ece`: see `expected_calibration_error`.
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
    ranked = [1] if len(numbers) == 2 else numbers.tolist()
    positives = [labels == label for label in ranked]
    return Scores(
        accuracy=float(right.mean()),
        accuracy_low=low,
        accuracy_high=high,
        balanced_accuracy=float(np.nanmean(recall)),
        loss=float(log_loss(labels, probabilities, labels=numbers)),
        auroc=_mean_if_any(
            roc_auc_score(positive, probabilities[:, label])
            for label, positive in zip(ranked, positives, strict=True)
            if 0 < positive.sum() < len(labels)
        ),
        average_precision=_mean_if_any(
            average_precision_score(positive, probabilities[:, label])
            for label, positive in zip(ranked, positives, strict=True)
            if positive.any()
        ),
        f1_macro=float(np.nanmean(f1)),
        brier=float(squared_errors(labels, probabilities).mean()),
        ece=expected_calibration_error(right, probabilities.max(axis=1)),
    )


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion by Wilson's score method, without continuity correction."""
    from scipy.stats import binomtest

    interval = binomtest(successes, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def expected_calibration_error(right: NDArray[np.bool_], confidences: NDArray[np.float64]) -> float:
    """Return how far the highest probability is from the accuracy, in [0, 1]: 0 where 80% sure is right in 80%.

    Images are put into 15 equally wide bins by their highest probability, `confidences` (n,), each with its upper edge;
    the distances of a bin's accuracy from its mean probability are averaged by the number of images (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). `right`, (n,): whether the prediction is right.
    """
    gaps = np.bincount(confidence_bins(confidences), right - confidences, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(right))


def confidence_bins(confidences: NDArray[np.float64]) -> Labels:
    """Return the number, from 0, of the bin of each of these probabilities above 0, (n,)."""
    bins: Labels = np.ceil(confidences * CALIBRATION_BINS).astype(np.int64) - 1
    return bins


def squared_errors(labels: Labels, probabilities: Probabilities) -> NDArray[np.float64]:
    """Return what each image adds to the mean that is the Brier score (see `Scores`), (n,)."""
    classes = probabilities.shape[1]
    errors = (probabilities - (labels[:, None] == np.arange(classes))) ** 2
    added: NDArray[np.float64] = errors[:, 1] if classes == 2 else errors.sum(axis=1)
    return added


def _mean_if_any(values: Iterable[float]) -> float | None:
    """Return the mean of the values that are defined, `None` if none is."""
    defined = [float(value) for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else None
