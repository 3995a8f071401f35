"""Several runs of one pipeline, of folds or of seeds: what they say together."""

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
    """One of the runs: its `name`, the number of its test images, both accuracies, and what fine-tuning changed."""

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
    """What several runs say together.

    Of folds, in which each image is tested once, `head` and `finetuned` are the accuracies on all `images`, with
    their 95% intervals, and `gain` is that on all images. Its intervals are at least as wide as `corrected_half` has
    it, and a verdict asks for one without 0, too. Of seeds, whose test images are the same, they are means over the
    runs, from the lowest to the highest run, and there is no verdict.
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
    the mean is (1 / runs + `test_to_train`) times that of the runs, since gains that come of nearly the same training
    vary less than gains at large.
    """
    from scipy.stats import t

    runs = len(gains)
    variance = (1 / runs + test_to_train) * statistics.variance(gains)
    return float(t.ppf((1 + CONFIDENCE) / 2, runs - 1)) * math.sqrt(variance)


def combine_folds(
    predictions: dict[str, Predictions], test_to_train: float, groups: Groups | None = None, watched: bool = False
) -> Together:
    """Put the runs of all folds, by name, together.

    `groups`: the number of the group of each image of all folds, (n,); the others as for `corrected_half` and
    `compare`. Raises StageError where an image was tested in two folds: they are of different data.
    """
    runs, pooled = _runs(predictions), join(list(predictions.values()))
    if len(set(pooled.paths)) < len(pooled.paths):
        raise StageError("the folds are of different data: an image is in the test part of two")
    head, finetuned = (
        (scores.accuracy, scores.accuracy_low, scores.accuracy_high)
        for scores in (score(pooled.labels, values, groups) for values in pooled.models.values())
    )
    gain = compare(pooled.labels, pooled.head, pooled.finetuned, groups, watched=watched)
    # Around the gain on all images; folds differ in size by an image or so, hence the means hardly.
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
    """Put runs of other seeds on one split together; raises StageError where they were tested on different images."""
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
    """Return the predictions of all folds as those of one test."""
    labels, *both = (
        np.concatenate([getattr(run, name) for run in predictions]) for name in ("labels", "head", "finetuned")
    )
    return Predictions([path for run in predictions for path in run.paths], labels, predictions[0].classes, *both)


def describe_folds(together: Together) -> str:
    """Put the result of all folds into lines, the verdict last."""
    last = f"{describe_gain(together.gain)} {plural(len(together.runs), 'fold')}, each image tested once."
    return "\n".join([*_accuracies(together, f"on all {together.images:,} images", ""), last])


def describe_seeds(together: Together) -> str:
    """Put the result of several seeds into lines, the gain last."""
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
