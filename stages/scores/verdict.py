"""Whether fine-tuning helped, judged on the same pictures before and after."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stages.common.words import p_value, plural, points, points_range
from stages.scores.metrics import CONFIDENCE, Labels, Probabilities, predicted_labels, wilson_interval

Verdict = Literal["better", "worse", "no evidence"]


@dataclass(frozen=True)
class Gain:
    """What fine-tuning added, on the same pictures: fine-tuned minus head.

    `accuracy`, and its 95% interval (`paired_interval`) from `accuracy_low` to `accuracy_high`;
    `loss`: negative where fine-tuning lowered it;
    `fixed` and `broken`: the number of pictures that only the fine-tuned, or only the head checkpoint gets right;
    `mcnemar_p`: the exact two-sided p-value of McNemar's test (https://doi.org/10.1007/BF02295996): were both
    checkpoints equally good, `fixed` would be distributed like coin tosses. 1 where nothing changed;
    `verdict`: `no evidence` where that p-value is not below 0.05, else `better` or `worse`.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    fixed: int
    broken: int
    mcnemar_p: float
    verdict: Verdict


def compare(labels: Labels, head: Probabilities, finetuned: Probabilities) -> Gain:
    """Return what fine-tuning added, on the same pictures: fine-tuned minus head.

    Args:
        labels: (n,).
        head: probabilities (n, classes).
        finetuned: likewise.
    """
    from sklearn.metrics import log_loss

    right, right_after = predicted_labels(head) == labels, predicted_labels(finetuned) == labels
    fixed, broken = int((right_after & ~right).sum()), int((right & ~right_after).sum())
    low, high = paired_interval(int((right & right_after).sum()), fixed, broken, len(labels))
    p = mcnemar_p(fixed, broken)
    numbers = np.arange(head.shape[1])
    loss, loss_after = (float(log_loss(labels, values, labels=numbers)) for values in (head, finetuned))
    verdict: Verdict = "no evidence"
    if p < 1 - CONFIDENCE:
        verdict = "better" if fixed > broken else "worse"
    return Gain(
        accuracy=(fixed - broken) / len(labels),
        accuracy_low=low,
        accuracy_high=high,
        loss=loss_after - loss,
        fixed=fixed,
        broken=broken,
        mcnemar_p=p,
        verdict=verdict,
    )


def mcnemar_p(fixed: int, broken: int) -> float:
    """Return the p-value of `Gain.mcnemar_p`."""
    from scipy.stats import binomtest

    return float(binomtest(fixed, fixed + broken, 0.5).pvalue) if fixed + broken else 1.0


def paired_interval(both: int, fixed: int, broken: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of the difference of two proportions of the same pictures.

    Newcombe's hybrid score method, number 10 of Statistics in Medicine 17:2635-2650 (1998),
    https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C. It joins the Wilson intervals of
    the two proportions by the correlation of their successes, and has a width where the models never differ, too.

    Args:
        both: pictures that both models get right.
        fixed: that only the second one does.
        broken: that only the first one does.
        count: of all pictures.
    """
    neither = count - both - fixed - broken
    first, second = both + broken, both + fixed
    p, q = first / count, second / count
    (p_low, p_high), (q_low, q_high) = wilson_interval(first, count), wilson_interval(second, count)
    product = float(both * neither - fixed * broken)
    if product > 0:  # continuity correction, which does not change the sign
        product = max(product - count / 2, 0.0)
    margins = first * (count - first) * second * (count - second)
    correlation = product / math.sqrt(margins) if margins else 0.0

    def join(below: float, above: float) -> float:
        return math.sqrt(max(below**2 - 2 * correlation * below * above + above**2, 0))

    difference = q - p
    return difference - join(q - q_low, p_high - p), difference + join(q_high - q, p - p_low)


def describe_verdict(verdict: Verdict) -> str:
    """Put a verdict into words."""
    words: dict[Verdict, str] = {
        "better": "Fine-tuning helped",
        "worse": "Fine-tuning made it worse",
        "no evidence": "No evidence that fine-tuning helped",
    }
    return words[verdict]


def describe_gain(gain: Gain) -> str:
    """Put the verdict into one plain sentence."""
    if not (gain.loss or gain.fixed or gain.broken):
        return "No evidence that fine-tuning helped: both checkpoints make the same predictions."
    interval = points_range(gain.accuracy_low, gain.accuracy_high)
    return (
        f"{describe_verdict(gain.verdict)}: {points(gain.accuracy)} "
        f"(95% interval {interval}, {p_value(gain.mcnemar_p)}): "
        f"{plural(gain.fixed, 'picture')} fixed, {gain.broken:,} broken."
    )
