"""The scores of every class, and what a reader has to know beside them: rare, unequal and never predicted classes.

They are kept in a table: as metrics, `dvc exp show` would have a column for each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.common.format import enumerate_names, percent, plural, points, points_range
from stages.images.index import Groups
from stages.scores.bootstrap import RESAMPLES, resample_means
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions

_FEW = 20
_UNEQUAL = 10
_MOST_NAMED = 3


@dataclass(frozen=True)
class ClassScores:
    """What both checkpoints are worth on the test images of one class.

    `support`: its test images; a precision is `None` where the class was never predicted, a recall where it has no
    test image.
    """

    label: int
    class_name: str
    support: int
    head_precision: float | None
    head_recall: float | None
    finetuned_precision: float | None
    finetuned_recall: float | None


def score_classes(predictions: Predictions) -> list[ClassScores]:
    """Return the scores of every class, in the order of their labels."""
    from sklearn.metrics import precision_recall_fscore_support

    scores = []
    for probabilities in predictions.models.values():
        precision, recall, _, support = precision_recall_fscore_support(
            predictions.labels,
            predicted_labels(probabilities),
            labels=np.arange(len(predictions.classes)),
            zero_division=np.nan,
        )
        scores += [precision.tolist(), recall.tolist()]
    return [
        ClassScores(label, name, count, *(None if math.isnan(value) else value for value in values))
        for label, (name, count, *values) in enumerate(zip(predictions.classes, support.tolist(), *scores, strict=True))
    ]


@dataclass(frozen=True)
class BalancedGain:
    """Balanced accuracy, the mean recall of the tested classes, before and after, and what fine-tuning added to it.

    The 95% interval of `gain` is a bootstrap's over the images, or groups, of each class, paired.
    """

    head: float
    finetuned: float
    gain: float
    gain_low: float
    gain_high: float


def compare_balanced(predictions: Predictions, groups: Groups | None = None) -> BalancedGain | None:
    """Return the gain in balanced accuracy where classes are unequal, more than 10 to 1; else `None`."""
    counts = np.bincount(predictions.labels, minlength=len(predictions.classes))
    tested = np.flatnonzero(counts)
    if counts[tested].max() <= _UNEQUAL * counts[tested].min():
        return None
    right = [predicted_labels(values) == predictions.labels for values in predictions.models.values()]
    changes = np.subtract(right[1], right[0], dtype=np.float64)
    chance, gains = np.random.default_rng(0), np.zeros(RESAMPLES)
    for label in tested:
        own = predictions.labels == label
        gains += resample_means(changes[own], None if groups is None else groups[own], chance) / len(tested)
    head, finetuned = (float(np.mean([values[predictions.labels == label].mean() for label in tested]))
                       for values in right)  # fmt: skip
    low, high = np.percentile(gains, [2.5, 97.5]).tolist()
    return BalancedGain(head, finetuned, finetuned - head, low, high)


def find_remarks(
    classes: Sequence[ClassScores], balanced: BalancedGain | None, split: dict[str, Any], copies: int
) -> list[str]:
    """Return lines for the console and the report; none where there is nothing to say."""
    tested = [scores for scores in classes if scores.support]
    remarks = []
    if balanced is not None:
        most, least = (function(scores.support for scores in tested) for function in (max, min))
        values = (
            f"{percent(balanced.head)} before and {percent(balanced.finetuned)} after fine-tuning "
            f"({points(balanced.gain)}, 95% interval {points_range(balanced.gain_low, balanced.gain_high)})"
        )
        if balanced.gain_low == balanced.gain_high:  # no image changed, of which no interval can be resampled
            values = percent(balanced.finetuned)
        remarks.append(
            f"The classes are unequal, {most:,} test images to {least:,}: look at the balanced accuracy, {values}."
        )
    if never := [scores.class_name for scores in tested if scores.finetuned_precision is None]:
        remarks.append(f"Never predicted by the fine-tuned network: {enumerate_names(never, _MOST_NAMED)}.")
    if few := [scores.class_name for scores in tested if scores.support < _FEW]:
        remarks.append(
            f"Fewer than {_FEW} test images, which say little of a class: {enumerate_names(few, _MOST_NAMED)}."
        )
    if untested := [scores.class_name for scores in classes if not scores.support]:
        remarks.append(f"Without test images: {enumerate_names(untested, _MOST_NAMED)}.")
    if copies:
        remarks.append(f"{plural(copies, 'test image')} not counted: the bytes are those of another.")
    if rejected := len(split["rejected"]):
        remarks.append(f"{plural(rejected, 'file')} rejected by split: see split.json.")
    return remarks + [f"Split: {note}." for note in split["notes"]]
