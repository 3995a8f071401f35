"""Whether probabilities mean what they say, without and with the temperature; and how much to leave to a person.

`calibration.json` has both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.scores.bootstrap import draw_counts
from stages.scores.coverage import Coverage, choose_threshold, measure_coverage
from stages.scores.metrics import Labels, Probabilities, expected_calibration_error, predicted_labels, squared_errors
from stages.scores.predictions import Predictions, image_losses


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """What probabilities are worth: mean log-loss in nats, Brier score and expected calibration error, as in `Scores`.

    Lower is better. The intervals are those of a bootstrap over the test images (percentiles of 2,000). The calibration
    error has none: it is biased upwards, and more so on a resample, which holds images twice
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
    """Measure what a temperature changed, from probabilities (n, classes) that it is in."""
    sides = [without_temperature(probabilities, temperature), probabilities]
    # Of each image, its log-loss and its squared error before, after, and their change: (n, 6).
    before, after = (np.stack([image_losses(labels, p), squared_errors(labels, p)], axis=1) for p in sides)
    every = np.concatenate([before, after, after - before], axis=1)
    drawn = np.concatenate([counts @ every for counts in draw_counts(len(labels), np.random.default_rng(0))])
    rows = np.concatenate([every.mean(axis=0)[None], np.percentile(drawn / len(labels), [2.5, 97.5], axis=0)])
    estimates = [Estimate(*column) for column in rows.T.tolist()]
    first, second = (expected_calibration_error(predicted_labels(p) == labels, p.max(axis=1)) for p in sides)
    losses, briers, errors = estimates[::2], estimates[1::2], (first, second, second - first)
    return Calibration(checkpoint, temperature, *map(Quality, losses, briers, errors))


def without_temperature(probabilities: Probabilities, temperature: float) -> Probabilities:
    """Return the probabilities (n, classes) that the logits have when they are not divided by `temperature`."""
    from scipy.special import softmax

    if temperature == 1:
        return probabilities
    with np.errstate(divide="ignore"):
        plain: Probabilities = softmax(np.log(probabilities) * temperature, axis=1)
    return plain
