"""Combined results of several runs, of folds or of seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.common.cli import StageError
from stages.common.format import percent, percent_range, plural, points, points_range, signed
from stages.images.index import Groups
from stages.scores.metrics import CONFIDENCE, predicted_labels, score
from stages.scores.predictions import Predictions
from stages.scores.verdict import Gain, compare, describe_gain, judge_loss, loss_range


@dataclass(frozen=True)
class Run:
    """One of the runs: its `name`, number of test images, both accuracies, and the effect of fine-tuning."""

    name: str
    images: int
    head: float
    finetuned: float
    fixed: int
    broken: int
    loss: float

    @property
    def gain(self) -> float:
        """Fine-tuned minus head."""
        return self.finetuned - self.head


@dataclass(frozen=True)
class Together:
    """The combined result of several runs.

    Folds test each image once: `head` and `finetuned` are the accuracies on all `images`, with 95% intervals, and
    `gain` is the difference on all images. Its intervals are at least as wide as those of `corrected_half`, and a
    verdict needs one without 0. Seeds share their test images: the numbers are means over the runs, with the lowest and
    highest run as bounds, and there is no verdict.
    """

    runs: list[Run]
    images: int
    head: float
    head_low: float
    head_high: float
    finetuned: float
    finetuned_low: float
    finetuned_high: float
    gain: Gain


def corrected_half(gains: Sequence[float], test_to_train: float) -> float:
    """Return half the width of the 95% interval of a mean over runs, at least two, that share training images.

    The corrected resampled t-test of Nadeau and Bengio (2003, https://doi.org/10.1023/A:1024068626366): the variance of
    the mean is (1 / runs + `test_to_train`) times that of the runs, since runs that share training images vary less
    than independent ones.
    """
    from scipy.stats import t

    runs = len(gains)
    variance = (1 / runs + test_to_train) * statistics.variance(gains)
    return float(t.ppf((1 + CONFIDENCE) / 2, runs - 1)) * math.sqrt(variance)


def combine_folds(
    predictions: dict[str, Predictions], test_to_train: float, groups: Groups | None = None, watched: bool = False
) -> Together:
    """Combine the runs of all folds, by name.

    `groups`: the number of the group of each image of all folds, (n,); the others as for `corrected_half` and
    `compare`. Raises StageError if an image was tested in two folds, which are then of different datasets.
    """
    runs, pooled = _runs(predictions), join(list(predictions.values()))
    if len(set(pooled.paths)) < len(pooled.paths):
        raise StageError("the folds are of different data: an image is in the test part of two")
    head, finetuned = (
        (scores.accuracy, scores.accuracy_low, scores.accuracy_high)
        for scores in (score(pooled.labels, values, groups) for values in pooled.models.values())
    )
    gain = compare(pooled.labels, pooled.head, pooled.finetuned, groups, watched=watched)
    # Around the gain on all images, which is nearly the mean over folds, since their sizes hardly differ.
    half = corrected_half([run.gain for run in runs], test_to_train)
    low, high = min(gain.accuracy_low, gain.accuracy - half), max(gain.accuracy_high, gain.accuracy + half)
    gain = replace(gain, accuracy_low=low, accuracy_high=high)
    if gain.loss_low is not None and gain.loss_high is not None:
        half = corrected_half([run.loss for run in runs], test_to_train)
        ends = min(gain.loss_low, gain.loss - half), max(gain.loss_high, gain.loss + half)
        gain = replace(gain, loss_low=ends[0], loss_high=ends[1], loss_verdict=None if watched else judge_loss(ends))
    if not watched and low <= 0 <= high:
        gain = replace(gain, verdict="no evidence")
    return Together(runs, len(pooled.paths), *head, *finetuned, gain)


def combine_seeds(predictions: dict[str, Predictions]) -> Together:
    """Combine runs of different seeds on one split; raises StageError if their test images differ."""
    if len({tuple(run.paths) for run in predictions.values()}) > 1:
        raise StageError("the seeds are of different data: their test parts are not the same")
    runs = _runs(predictions)
    spreads = [
        (sum(values) / len(runs), min(values), max(values))
        for values in ([getattr(run, name) for run in runs] for name in ("head", "finetuned", "gain", "loss"))
    ]
    counts = (sum(run.fixed for run in runs), sum(run.broken for run in runs))
    gain = Gain(*spreads[2], *spreads[3], *counts, None, None, None)
    return Together(runs, runs[0].images, *spreads[0], *spreads[1], gain)


def _runs(predictions: dict[str, Predictions]) -> list[Run]:
    runs = []
    for name, run in predictions.items():
        gain = compare(run.labels, run.head, run.finetuned)
        head, finetuned = (float((predicted_labels(own) == run.labels).mean()) for own in run.models.values())
        runs.append(Run(name, len(run.paths), head, finetuned, gain.fixed, gain.broken, gain.loss))
    return runs


def join(predictions: Sequence[Predictions]) -> Predictions:
    """Concatenate the predictions of all folds."""
    labels, *both = (
        np.concatenate([getattr(run, name) for run in predictions]) for name in ("labels", "head", "finetuned")
    )
    return Predictions([path for run in predictions for path in run.paths], labels, predictions[0].classes, *both)


def describe_folds(together: Together) -> str:
    """Return the result of all folds as lines, the verdict last."""
    last = f"{describe_gain(together.gain)} {plural(len(together.runs), 'fold')}, each image tested once."
    return "\n".join([*_accuracies(together, f"on all {together.images:,} images", ""), last])


def describe_seeds(together: Together) -> str:
    """Return the result of several seeds as lines, the gain last."""
    runs, gain = len(together.runs), together.gain
    last = (
        f"Gain of {plural(runs, 'seed')} on the same {plural(together.images, 'test image')}, mean and range: "
        f"accuracy {points(gain.accuracy)} ({points_range(gain.accuracy_low, gain.accuracy_high)}), log-loss "
        f"{signed(gain.loss)} ({loss_range(gain)}). No verdict: seeds say nothing of other images; folds do."
    )
    return "\n".join([*_accuracies(together, f"mean of {runs}", "lowest and highest "), last])


def _accuracies(together: Together, what: str, bounds: str) -> list[str]:
    return [
        f"{name:<10}  accuracy {what}: {percent(accuracy)}  {bounds}{percent_range(low, high)}"
        for name, accuracy, low, high in (
            ("head", together.head, together.head_low, together.head_high),
            ("fine-tuned", together.finetuned, together.finetuned_low, together.finetuned_high),
        )
    ]
