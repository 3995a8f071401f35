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
    their 95% intervals, and `gain` is that on all images. Its intervals are at least as wide as `corrected_interval`,
    and a verdict asks for one without 0, too.

    Of seeds, whose test images are the same, they are means over the runs, from the lowest to the highest run, and
    there is no verdict: how far runs differ says nothing of the choice of test images.
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


def corrected_interval(gains: Sequence[float], test_to_train: float) -> tuple[float, float]:
    """Return the 95% interval of a mean over runs that share training images.

    The corrected resampled t-test of Nadeau and Bengio (2003, https://doi.org/10.1023/A:1024068626366): the variance of
    the mean is (1 / runs + `test_to_train`) times that of the runs, at least two: training sets overlap, and gains that
    come of nearly the same training vary less than gains at large.
    """
    from scipy.stats import t

    runs, mean, variance = len(gains), statistics.fmean(gains), statistics.variance(gains)
    half = float(t.ppf((1 + CONFIDENCE) / 2, runs - 1)) * math.sqrt((1 / runs + test_to_train) * variance)
    return mean - half, mean + half


def combine_folds(
    predictions: dict[str, Predictions], test_to_train: float, groups: Groups | None = None, watched: bool = False
) -> Together:
    """Put the runs of all folds, by name, together.

    `groups`: the number of the group of each image of all folds, (n,); the others as for `corrected_interval` and
    `compare`. Raises StageError where an image was tested in two folds: they are of different data.
    """
    paths = [path for run in predictions.values() for path in run.paths]
    if len(set(paths)) < len(paths):
        raise StageError("the folds are of different data: an image is in the test part of two")
    runs, pooled = _runs(predictions), join(list(predictions.values()))
    head, finetuned = (score(pooled.labels, values, groups) for values in (pooled.head, pooled.finetuned))
    gain = compare(pooled.labels, pooled.head, pooled.finetuned, groups, watched=watched)

    def corrected(low: float, high: float, middle: float, of_runs: list[float]) -> tuple[float, float]:
        # Around the gain on all images; folds differ in size by an image or so, hence the means hardly.
        ends = corrected_interval(of_runs, test_to_train)
        half = (ends[1] - ends[0]) / 2
        return min(low, middle - half), max(high, middle + half)

    low, high = corrected(gain.accuracy_low, gain.accuracy_high, gain.accuracy, [run.gain for run in runs])
    gain = replace(gain, accuracy_low=low, accuracy_high=high)
    if gain.loss_low is not None and gain.loss_high is not None:
        ends = corrected(gain.loss_low, gain.loss_high, gain.loss, [run.loss for run in runs])
        gain = replace(gain, loss_low=ends[0], loss_high=ends[1], loss_verdict=None if watched else judge_loss(ends))
    if not watched and low <= 0 <= high:
        gain = replace(gain, verdict="no evidence")
    return Together(
        runs, len(paths), head.accuracy, head.accuracy_low, head.accuracy_high,
        finetuned.accuracy, finetuned.accuracy_low, finetuned.accuracy_high, gain,
    )  # fmt: skip


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
    return Together(
        runs, runs[0].images, *spreads[0], *spreads[1], Gain(*spreads[2], *spreads[3], *counts, None, None, None)
    )


def _runs(predictions: dict[str, Predictions]) -> list[Run]:
    runs = []
    for name, run in predictions.items():
        gain = compare(run.labels, run.head, run.finetuned)
        head, finetuned = (
            float((predicted_labels(values) == run.labels).mean()) for values in (run.head, run.finetuned)
        )
        runs.append(Run(name, len(run.paths), head, finetuned, gain.fixed, gain.broken, gain.loss))
    return runs


def join(predictions: Sequence[Predictions]) -> Predictions:
    """Return the predictions of all folds as those of one test."""
    first = predictions[0]
    return Predictions(
        [path for run in predictions for path in run.paths],
        np.concatenate([run.labels for run in predictions]),
        first.classes,
        np.concatenate([run.head for run in predictions]),
        np.concatenate([run.finetuned for run in predictions]),
    )


def describe_folds(together: Together) -> str:
    """Put the result of all folds into lines, the verdict last."""
    what = f"{plural(len(together.runs), 'fold')}, each image tested once"
    return "\n".join(
        [*_accuracies(together, f"on all {together.images:,} images", ""), f"{describe_gain(together.gain)} {what}."]
    )


def describe_seeds(together: Together) -> str:
    """Put the result of several seeds into lines, the gain last."""
    runs, gain = len(together.runs), together.gain
    return "\n".join(
        [
            *_accuracies(together, f"mean of {runs}", "lowest and highest "),
            f"Gain of {plural(runs, 'seed')} on the same {plural(together.images, 'test image')}, mean and range: "
            f"accuracy {points(gain.accuracy)} ({points_range(gain.accuracy_low, gain.accuracy_high)}), log-loss "
            f"{signed(gain.loss)} ({loss_range(gain)}). No verdict: seeds say nothing of other images; folds do.",
        ]
    )


def _accuracies(together: Together, what: str, bounds: str) -> list[str]:
    rows = [("head", together.head, together.head_low, together.head_high)]
    rows.append(("fine-tuned", together.finetuned, together.finetuned_low, together.finetuned_high))
    return [
        f"{name:<10}  accuracy {what}: {percent(accuracy)}  {bounds}{percent_range(low, high)}"
        for name, accuracy, low, high in rows
    ]
