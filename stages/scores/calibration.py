"""Calibration with and without the temperature, and which images to leave to a person: `calibration.json`.

The latter is selective classification, risk against coverage (El-Yaniv and Wiener 2010,
https://www.jmlr.org/papers/v11/el-yaniv10a.html), with the highest probability as confidence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.common.format import percent_range, plural, probability
from stages.scores.metrics import (
    Floats,
    Labels,
    Probabilities,
    draw_counts,
    expected_calibration_error,
    predicted_labels,
    squared_errors,
    wilson_interval,
)
from stages.scores.predictions import Predictions, image_losses

MOST_WRONG = 0.01


@dataclass(frozen=True)
class Coverage:
    """Which images to leave to a person, and the results of this on the test images.

    `threshold`: images with a highest probability below it are left. It is the lowest at which at most 1% of the other
    `validation` images are wrong; `None` if there is none. `left`: their share of the test images, with its 95%
    interval; `answered`, `mistakes`: numbers of the other test images and of mistakes among them, a share with the 95%
    interval `wrong_low` to `wrong_high`. Both intervals are Wilson's.
    """

    threshold: float | None
    validation: int
    left: float = 1.0
    left_low: float = 0.0
    left_high: float = 1.0
    answered: int = 0
    mistakes: int = 0
    wrong_low: float = 0.0
    wrong_high: float = 1.0


def risk_curve(labels: Labels, probabilities: Probabilities) -> tuple[Floats, Floats, Floats]:
    """Return the distinct highest probabilities, (m,), descending, and for each as threshold two shares, (m,).

    These are the share of images answered, and the share of mistakes among them.
    """
    confidence = probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    wrong, answered = np.cumsum((predicted_labels(probabilities) != labels)[order]), np.arange(1, len(order) + 1)
    last = np.append(np.diff(confidence[order]) < 0, True)
    return confidence[order][last], answered[last] / len(order), (wrong / answered)[last]


def choose_threshold(labels: Labels, probabilities: Probabilities) -> float | None:
    """Return the lowest threshold at which at most 1% of the answers are wrong, `None` if there is none."""
    confidence, _, wrong = risk_curve(labels, probabilities)
    return min(confidence[wrong <= MOST_WRONG].tolist(), default=None)


def measure_coverage(
    labels: Labels, probabilities: Probabilities, threshold: float | None, validation: int
) -> Coverage:
    """Measure a threshold, chosen on `validation` images, on test images, labels (n,)."""
    if threshold is None:
        return Coverage(None, validation)
    sure = probabilities.max(axis=1) >= threshold
    count, answered = len(labels), int(sure.sum())
    mistakes = int((predicted_labels(probabilities) != labels)[sure].sum())
    left = wilson_interval(count - answered, count)
    wrong = wilson_interval(mistakes, answered) if answered else (0.0, 1.0)
    return Coverage(threshold, validation, 1 - answered / count, *left, answered, mistakes, *wrong)


def describe_coverage(coverage: Coverage) -> str:
    """Describe it in sentences."""
    if not coverage.validation:
        return "No validation images to choose from which probability on a prediction can do without a person."
    if coverage.threshold is None:
        return f"Of the validation images, even the most confident are wrong in more than {MOST_WRONG:.0%}."
    return (
        f"At most {MOST_WRONG:.0%} of the predictions with a probability of {coverage.threshold:.3f} or more are wrong "
        f"on the {plural(coverage.validation, 'validation image')}. That leaves {probability(coverage.left)} of the "
        f"test images to a person (95% interval {percent_range(coverage.left_low, coverage.left_high)}), and "
        f"{plural(coverage.mistakes, 'mistake')} on the other {coverage.answered:,} (95% interval "
        f"{percent_range(coverage.wrong_low, coverage.wrong_high)}). "
        f"`python -m stages.predict --reject {coverage.threshold:.3f}` leaves them unanswered."
    )


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """Mean log-loss in nats, Brier score and expected calibration error, as in `Scores`; lower is better.

    The intervals are bootstrap ones over the test images. The calibration error has none: it is biased upwards, even
    more on resamples, which contain images twice (https://proceedings.mlr.press/v151/roelofs22a.html).
    """

    loss: Estimate
    brier: Estimate
    ece: float


@dataclass(frozen=True)
class Calibration:
    """A checkpoint's SHA-256 and `temperature`, and its probabilities without (`before`) and with it (`after`).

    `change`: after minus before, on the same resampled images.
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
    """Measure both checkpoints from probabilities that include their `temperatures`.

    `checkpoints`: the SHA-256 of both; `validation`: labels, (n,), and probabilities, (n, classes).
    """
    both = zip(predictions.models.values(), temperatures, checkpoints, strict=True)
    head, finetuned = (measure_calibration(predictions.labels, *of_one) for of_one in both)
    threshold = choose_threshold(*validation) if len(validation[0]) else None
    coverage = measure_coverage(predictions.labels, predictions.finetuned, threshold, len(validation[0]))
    return Calibrations(head, finetuned, coverage)


def measure_calibration(
    labels: Labels, probabilities: Probabilities, temperature: float, checkpoint: str
) -> Calibration:
    """Measure the effect of a temperature from probabilities (n, classes) that include it."""
    sides = [without_temperature(probabilities, temperature), probabilities]
    # (n, 6): log-loss and squared error of each image before, after, and their change.
    before, after = (np.stack([image_losses(labels, p), squared_errors(labels, p)], axis=1) for p in sides)
    every = np.concatenate([before, after, after - before], axis=1)
    drawn = np.concatenate([counts @ every for counts in draw_counts(len(labels), np.random.default_rng(0))])
    bounds = np.percentile(drawn / len(labels), [2.5, 97.5], axis=0)
    estimates = [Estimate(*column) for column in np.vstack([every.mean(axis=0), bounds]).T.tolist()]
    first, second = (expected_calibration_error(predicted_labels(p) == labels, p.max(axis=1)) for p in sides)
    losses, briers, errors = estimates[::2], estimates[1::2], (first, second, second - first)
    return Calibration(checkpoint, temperature, *map(Quality, losses, briers, errors))


def without_temperature(probabilities: Probabilities, temperature: float) -> Probabilities:
    """Return the probabilities (n, classes) of logits that are not divided by `temperature`."""
    from scipy.special import softmax

    if temperature == 1:
        return probabilities
    with np.errstate(divide="ignore"):
        plain: Probabilities = softmax(np.log(probabilities) * temperature, axis=1)
    return plain
