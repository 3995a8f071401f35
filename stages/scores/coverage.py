"""Leaving the least sure pictures to a person: how many, for how few mistakes on the others.

Risk against coverage, as El-Yaniv and Wiener 2010 have it (https://www.jmlr.org/papers/v11/el-yaniv10a.html), with the
highest probability as confidence.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.common.format import percent_range, plural, probability
from stages.scores.metrics import Labels, Probabilities, predicted_labels, wilson_interval

MOST_WRONG = 0.01
_RESAMPLES = 2000

_Values = NDArray[np.float64]


@dataclass(frozen=True)
class Coverage:
    """Which of the test pictures to leave to a person, so that at most 1% of the others are predicted wrongly.

    `threshold`: those with a highest probability below it; `None`: all of them;
    `left`: their share, as small as it can be, and its 95% interval (percentiles of 2,000 bootstraps, in each of which
    the threshold is chosen anew);
    `answered`, `mistakes`: how many others there are and how many of them are wrong, a share whose 95% interval is
    `wrong_low` to `wrong_high` (Wilson).
    """

    threshold: float | None
    left: float
    left_low: float
    left_high: float
    answered: int
    mistakes: int
    wrong_low: float
    wrong_high: float


def risk_curve(labels: Labels, probabilities: Probabilities) -> tuple[_Values, _Values]:
    """Return the shares of pictures that are answered, ascending, and of these the shares that are wrong.

    One for each distinct highest probability, (m,) each: the pictures with that or more are answered.

    Args:
        labels: (n,).
        probabilities: (n, classes).
    """
    wrong, _, last = _ordered(labels, probabilities)
    answered = np.arange(1, len(wrong) + 1)
    return answered[last] / len(wrong), (np.cumsum(wrong) / answered)[last]


def measure_coverage(labels: Labels, probabilities: Probabilities) -> Coverage:
    """Find the threshold.

    Args:
        labels: (n,).
        probabilities: (n, classes).
    """
    wrong, confidence, last = _ordered(labels, probabilities)
    count, chance = len(wrong), np.random.default_rng(0)
    ends = np.flatnonzero(last)
    most = _most_answered(np.ones(count), wrong, ends)
    shares = [
        1 - _most_answered(np.bincount(chance.integers(count, size=count), minlength=count), wrong, ends)[0] / count
        for _ in range(_RESAMPLES)
    ]
    low, high = np.percentile(shares, [2.5, 97.5]).tolist()
    answered, position = int(most[0]), most[1]
    mistakes = int(wrong[:answered].sum())
    interval = wilson_interval(mistakes, answered) if answered else (0.0, 1.0)
    threshold = None if position is None else float(confidence[position])
    return Coverage(threshold, 1 - answered / count, low, high, answered, mistakes, *interval)


def _ordered(labels: Labels, probabilities: Probabilities) -> tuple[NDArray[np.bool_], _Values, NDArray[np.bool_]]:
    """Return, the surest picture first: whether it is wrong, how sure, and whether the next one is less sure."""
    confidence = probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    sorted_confidence = confidence[order]
    last = np.append(sorted_confidence[1:] < sorted_confidence[:-1], True)
    return (predicted_labels(probabilities) != labels)[order], sorted_confidence, last


def _most_answered(
    counts: NDArray[np.generic], wrong: NDArray[np.bool_], ends: NDArray[np.int64]
) -> tuple[float, int | None]:
    """Return the most pictures that can be answered, each being there `counts` times, and the position of the last."""
    answered = np.cumsum(counts)[ends]
    mistakes = np.cumsum(counts * wrong)[ends]
    good = np.flatnonzero((mistakes <= MOST_WRONG * answered) & (answered > 0))
    return (float(answered[good[-1]]), int(ends[good[-1]])) if len(good) else (0.0, None)


def describe_coverage(coverage: Coverage) -> str:
    """Put it into one sentence."""
    goal = f"To be wrong in at most {MOST_WRONG:.0%} of the cases"
    if coverage.threshold is None:
        return f"{goal}, leave all pictures to a person: also of the surest ones too many are wrong."
    wrong = f"{plural(coverage.mistakes, 'mistake')} on the other {coverage.answered:,} test pictures"
    wrong += f" (95% interval {percent_range(coverage.wrong_low, coverage.wrong_high)})"
    if coverage.answered and coverage.left == 0:
        return f"{goal}, no picture has to be left to a person: {wrong}."
    return (
        f"{goal}, leave {probability(coverage.left)} to a person (95% interval {probability(coverage.left_low)} to "
        f"{probability(coverage.left_high)}), those below a probability of {coverage.threshold:.3f}: {wrong}."
    )
