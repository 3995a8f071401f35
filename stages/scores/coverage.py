"""Leaving the least sure images to a person: how many, for how few mistakes on the others.

Risk against coverage, as El-Yaniv and Wiener 2010 have it (https://www.jmlr.org/papers/v11/el-yaniv10a.html), with the
highest probability as confidence.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.common.format import percent_range, plural, probability
from stages.scores.metrics import Labels, Probabilities, predicted_labels, wilson_interval

MOST_WRONG = 0.01

_Values = NDArray[np.float64]


@dataclass(frozen=True)
class Coverage:
    """Which images to leave to a person, and what that came to on the test images.

    `threshold`: those with a highest probability below it, chosen on `validation` images so that at most 1% of the
    others are wrong and as few as possible are left; `None` where there is no such threshold. `left`: their share of
    the test images, with its 95% interval; `answered`, `mistakes`: how many others there are and how many of them are
    wrong, a share whose 95% interval is `wrong_low` to `wrong_high`. Both intervals are Wilson's.
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


def risk_curve(labels: Labels, probabilities: Probabilities) -> tuple[_Values, _Values]:
    """Return the shares of images that are answered, ascending, and of these the shares that are wrong, (m,) each.

    One for each distinct highest probability of `probabilities`, (n, classes): images with that or more are answered.
    """
    wrong, _, last = _ordered(labels, probabilities)
    answered = np.arange(1, len(wrong) + 1)
    return answered[last] / len(wrong), (np.cumsum(wrong) / answered)[last]


def choose_threshold(labels: Labels, probabilities: Probabilities) -> float | None:
    """Return the lowest probability from which at most 1% of the answers are wrong, `None` if there is none."""
    wrong, confidence, last = _ordered(labels, probabilities)
    good = np.flatnonzero(last & (np.cumsum(wrong) <= MOST_WRONG * np.arange(1, len(wrong) + 1)))
    return float(confidence[good[-1]]) if len(good) else None


def measure_coverage(
    labels: Labels, probabilities: Probabilities, threshold: float | None, validation: int
) -> Coverage:
    """Measure on test images, labels (n,), a threshold that was chosen on so many validation images."""
    if threshold is None:
        return Coverage(None, validation)
    sure = probabilities.max(axis=1) >= threshold
    count, answered = len(labels), int(sure.sum())
    mistakes = int((predicted_labels(probabilities) != labels)[sure].sum())
    left = wilson_interval(count - answered, count)
    wrong = wilson_interval(mistakes, answered) if answered else (0.0, 1.0)
    return Coverage(threshold, validation, 1 - answered / count, *left, answered, mistakes, *wrong)


def _ordered(labels: Labels, probabilities: Probabilities) -> tuple[NDArray[np.bool_], _Values, NDArray[np.bool_]]:
    """Return, the surest image first: whether it is wrong, how sure, and whether the next one is less sure."""
    confidence = probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    last = np.append(np.diff(confidence[order]) < 0, True)
    return (predicted_labels(probabilities) != labels)[order], confidence[order], last


def describe_coverage(coverage: Coverage) -> str:
    """Put it into sentences."""
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
