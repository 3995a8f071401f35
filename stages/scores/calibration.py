"""Whether probabilities mean what they say, without and with the temperature; and how much to leave to a person.

`calibration.json` has both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.scores.bootstrap import draw_counts
from stages.scores.coverage import Coverage, choose_threshold, measure_coverage
from stages.scores.metrics import Labels, Probabilities, calibration_gaps, predicted_labels, squared_errors
from stages.scores.predictions import Predictions, image_losses

_Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """What probabilities are worth: mean log-loss in nats, Brier score and expected calibration error, as in `Scores`.

    Lower is better. The intervals are those of a bootstrap over the test images (percentiles of 2,000). The
    calibration error has none: it is biased upwards, and more so on a resample, which holds images twice
    (https://proceedings.mlr.press/v151/roelofs22a.html).
    """

    loss: Estimate
    brier: Estimate
    ece: float


@dataclass(frozen=True)
class Calibration:
    """A checkpoint's `temperature`, and its probabilities `before` and `after` the logits were divided by it.

    `change`: after minus before, on the same resampled images; `checkpoint`: SHA-256 of the file.
    """

    checkpoint: str
    temperature: float
    before: Quality
    after: Quality
    change: Quality


@dataclass(frozen=True)
class Calibrations:
    """The content of `calibration.json`; `coverage` is the fine-tuned checkpoint's."""

    head: Calibration
    finetuned: Calibration
    coverage: Coverage

    @property
    def temperatures(self) -> dict[str, float]:
        """The temperatures by checkpoint, in the order of training."""
        return {"head": self.head.temperature, "finetuned": self.finetuned.temperature}


def measure_calibrations(
    predictions: Predictions,
    temperatures: Sequence[float],
    checkpoints: Sequence[str],
    validation: tuple[Labels, Probabilities],
) -> Calibrations:
    """Measure both checkpoints.

    Args:
        predictions: with the temperatures.
        temperatures: of the head and of the fine-tuned checkpoint.
        checkpoints: the SHA-256 of both files, likewise.
        validation: labels, (n,), and the fine-tuned checkpoint's probabilities, (n, classes), of validation images.
    """
    head, finetuned = (
        measure_calibration(predictions.labels, *of_one)
        for of_one in zip(predictions.models.values(), temperatures, checkpoints, strict=True)
    )
    threshold = choose_threshold(*validation) if len(validation[0]) else None
    coverage = measure_coverage(predictions.labels, predictions.finetuned, threshold, len(validation[0]))
    return Calibrations(head, finetuned, coverage)


def measure_calibration(
    labels: Labels, probabilities: Probabilities, temperature: float, checkpoint: str = ""
) -> Calibration:
    """Measure what a temperature changed.

    Args:
        labels: (n,).
        probabilities: with the temperature, (n, classes).
        temperature: above 0.
        checkpoint: SHA-256 of its file.
    """
    sides = [_Sums(labels, values) for values in (without_temperature(probabilities, temperature), probabilities)]
    before, after = (np.array(side.of(np.ones((1, len(labels)))))[:, 0] for side in sides)
    resamples = draw_counts(len(labels), np.random.default_rng(0))
    scores = zip(*([np.array(side.of(counts)) for side in sides] for counts in resamples), strict=True)
    drawn = [np.concatenate(parts, axis=1) for parts in scores]
    return Calibration(
        checkpoint,
        temperature,
        _quality(before, drawn[0]),
        _quality(after, drawn[1]),
        _quality(after - before, drawn[1] - drawn[0]),
    )


def without_temperature(probabilities: Probabilities, temperature: float) -> Probabilities:
    """Return the probabilities (n, classes) that the logits have when they are not divided by `temperature`."""
    from scipy.special import softmax

    if temperature == 1:
        return probabilities
    with np.errstate(divide="ignore"):
        plain: Probabilities = softmax(np.log(probabilities) * temperature, axis=1)
    return plain


class _Sums:
    """What each of n images adds to the three scores; of the calibration error, to each bin."""

    def __init__(self, labels: Labels, probabilities: Probabilities) -> None:
        self._losses = image_losses(labels, probabilities)
        self._errors = squared_errors(labels, probabilities)
        self._gaps = calibration_gaps(predicted_labels(probabilities) == labels, probabilities.max(axis=1))

    def of(self, counts: _Values) -> tuple[_Values, _Values, _Values]:
        """Return each score, (m,), of m samples that have each image so many times, (m, n)."""
        total = counts.sum(axis=1)
        gaps = np.abs(counts @ self._gaps).sum(axis=1)
        return counts @ self._losses / total, counts @ self._errors / total, gaps / total


def _quality(values: _Values, drawn: _Values) -> Quality:
    intervals = np.percentile(drawn[:2], [2.5, 97.5], axis=1).T.tolist()
    loss, brier = (Estimate(value, *interval) for value, interval in zip(values[:2].tolist(), intervals, strict=True))
    return Quality(loss, brier, float(values[2]))
