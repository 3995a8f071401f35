"""What a reader of the scores has to know beside them: rare classes, unequal ones, classes that are never predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.common.words import enumerate_names, percent, plural, points, points_range
from stages.scores.classes import ClassScores
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions

_FEW = 20
_UNEQUAL = 10
_MOST_NAMED = 3
_RESAMPLES = 10_000


@dataclass(frozen=True)
class BalancedGain:
    """Balanced accuracy, the mean recall of the tested classes, before and after, and what fine-tuning added to it.

    The 95% interval of `gain` is a bootstrap's over the pictures of each class, paired (percentiles of 10,000).
    """

    head: float
    finetuned: float
    gain: float
    gain_low: float
    gain_high: float


def compare_balanced(predictions: Predictions) -> BalancedGain | None:
    """Return the gain in balanced accuracy where classes are unequal, more than 10 to 1; else `None`."""
    counts = np.bincount(predictions.labels, minlength=len(predictions.classes))
    tested = np.flatnonzero(counts)
    if counts[tested].max() <= _UNEQUAL * counts[tested].min():
        return None
    right = [predicted_labels(values) == predictions.labels for values in predictions.models.values()]
    chance = np.random.default_rng(0)
    gains = np.zeros(_RESAMPLES)
    recalls: list[tuple[float, float]] = []
    for label in tested:
        before, after = (values[predictions.labels == label] for values in right)
        recalls.append((float(before.mean()), float(after.mean())))
        gains += _resample(before, after, chance) / len(tested)
    head, finetuned = (float(np.mean(values)) for values in zip(*recalls, strict=True))
    low, high = np.percentile(gains, [2.5, 97.5]).tolist()
    return BalancedGain(head, finetuned, finetuned - head, low, high)


def _resample(before: NDArray[np.bool_], after: NDArray[np.bool_], chance: np.random.Generator) -> NDArray[np.float64]:
    """Return gains in recall of a class on pictures drawn again from its own: how many are fixed, broken, neither."""
    fixed, broken = (after & ~before).mean(), (before & ~after).mean()
    drawn = chance.multinomial(len(before), [fixed, broken, 1 - fixed - broken], size=_RESAMPLES)
    gains: NDArray[np.float64] = (drawn[:, 0] - drawn[:, 1]) / len(before)
    return gains


def find_remarks(
    classes: Sequence[ClassScores], balanced: BalancedGain | None, split: dict[str, Any], copies: int
) -> list[str]:
    """Return lines for the console and the report; none where there is nothing to say.

    Args:
        classes: the scores of every class.
        balanced: as `compare_balanced` returns it.
        split: `split.json`.
        copies: test pictures that are not counted, since their bytes are those of another one.
    """
    tested = [scores for scores in classes if scores.support]
    remarks = []
    if balanced is not None:
        most, least = (function(scores.support for scores in tested) for function in (max, min))
        remarks.append(
            f"The classes are unequal, {most:,} test pictures to {least:,}: look at the balanced accuracy, "
            f"{percent(balanced.head)} before and {percent(balanced.finetuned)} after fine-tuning "
            f"({points(balanced.gain)}, 95% interval {points_range(balanced.gain_low, balanced.gain_high)})."
        )
    if never := [scores.name for scores in tested if scores.finetuned_precision is None]:
        remarks.append(f"Never predicted by the fine-tuned network: {enumerate_names(never, _MOST_NAMED)}.")
    if few := [scores.name for scores in tested if scores.support < _FEW]:
        remarks.append(
            f"Fewer than {_FEW} test pictures, which say little of a class: {enumerate_names(few, _MOST_NAMED)}."
        )
    if untested := [scores.name for scores in classes if not scores.support]:
        remarks.append(f"Without test pictures: {enumerate_names(untested, _MOST_NAMED)}.")
    if copies:
        remarks.append(f"{plural(copies, 'test picture')} not counted: the bytes are those of another.")
    if rejected := len(split["rejected"]):
        remarks.append(f"{plural(rejected, 'file')} rejected by split: see split.json.")
    return remarks + [f"Split: {note}." for note in split["notes"]]
