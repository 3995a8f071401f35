"""Whether fine-tuning helped: a paired comparison on the same images."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stages.common.format import p_value, plural, points, points_range, signed
from stages.images.index import Groups
from stages.scores.metrics import (
    CONFIDENCE,
    FEWEST,
    Labels,
    Probabilities,
    mean_interval,
    predicted_labels,
    sum_groups,
    widen,
    wilson_interval,
)
from stages.scores.predictions import image_losses

Verdict = Literal["better", "worse", "no evidence"]


@dataclass(frozen=True)
class Gain:
    """The gain from fine-tuning, on the same images: fine-tuned minus head.

    `accuracy`, with its 95% interval (`paired_interval`); `loss`: change in log-loss, negative if fine-tuning lowered
    it, with the interval of a paired bootstrap (`mean_interval`), `None` with fewer than 6 images;
    `fixed`, `broken`: numbers of images that only the fine-tuned, or only the head checkpoint gets right;
    `mcnemar_p`: the exact two-sided p-value of McNemar's test (https://doi.org/10.1007/BF02295996), under which each
    changed image is a fair coin toss; 1 if nothing changed;
    `verdict`, on accuracy: `no evidence` unless that p-value is below 0.05; `loss_verdict`: `no evidence` if the
    interval of `loss` contains 0 or is missing. `None`, like the p-value, if training watched the test images;
    `groups`: the number of groups, if images come in groups. Each is one observation: one toss for all its changes, and
    the interval of `accuracy` is at least as wide as that of resampled groups;
    `identical`: both checkpoints are the same network, and the gain is exactly 0.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    loss_low: float | None
    loss_high: float | None
    fixed: int
    broken: int
    mcnemar_p: float | None
    verdict: Verdict | None
    loss_verdict: Verdict | None
    groups: int | None = None
    identical: bool = False


def compare(
    labels: Labels,
    head: Probabilities,
    finetuned: Probabilities,
    groups: Groups | None = None,
    *,
    identical: bool = False,
    watched: bool = False,
) -> Gain:
    """Compare probabilities (n, classes) for the same images.

    `groups`: the number of each image's group, (n,); `watched`: training watched these images.
    """
    right, right_after = predicted_labels(head) == labels, predicted_labels(finetuned) == labels
    fixed, broken = int((right_after & ~right).sum()), int((right & ~right_after).sum())
    changes = np.subtract(right_after, right, dtype=np.float64)
    losses = image_losses(labels, finetuned) - image_losses(labels, head)
    both, of_loss = int((right & right_after).sum()), mean_interval(losses, groups)
    low, high = widen(paired_interval(both, fixed, broken, len(labels)), changes, groups, -1.0)
    if identical:
        low = high = 0.0
    p = None if watched else mcnemar_p(sum_groups(changes, groups).astype(np.int64))
    seen: Verdict = "no evidence" if p is None or p >= 1 - CONFIDENCE else "better" if fixed > broken else "worse"
    return Gain(
        accuracy=(fixed - broken) / len(labels),
        accuracy_low=low,
        accuracy_high=high,
        loss=float(losses.mean()),
        loss_low=of_loss and of_loss[0],
        loss_high=of_loss and of_loss[1],
        fixed=fixed,
        broken=broken,
        mcnemar_p=p,
        verdict=None if watched else seen,
        loss_verdict=None if watched else judge_loss(of_loss),
        groups=None if groups is None else len(np.unique(groups)),
        identical=identical,
    )


def judge_loss(bounds: tuple[float, float] | None) -> Verdict:
    """Return the verdict for the interval of the gain in log-loss."""
    return "no evidence" if bounds is None or bounds[0] <= 0 <= bounds[1] else "worse" if bounds[0] > 0 else "better"


def mcnemar_p(changes: NDArray[np.int64]) -> float:
    """Return `Gain.mcnemar_p` for `changes`: fixed minus broken of each image, or group."""
    from scipy.stats import binom

    chances = np.ones(1)  # of each number of fixed images
    for size, count in zip(*np.unique(np.abs(changes[changes != 0]), return_counts=True), strict=True):
        tosses = np.zeros(size * count + 1)
        tosses[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, tosses)
    sums = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return min(1.0, float(chances[np.abs(sums) >= abs(changes.sum())].sum()))


def paired_interval(both: int, fixed: int, broken: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of a difference of accuracies on `count` images, `both` of which both models get right.

    Newcombe's hybrid score method, number 10 of Statistics in Medicine 17:2635-2650 (1998),
    https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C. It combines the Wilson
    intervals of both proportions by their correlation, and has a positive width even if the models never differ.
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


def describe_gain(gain: Gain) -> str:
    """Return both verdicts in one line."""
    if gain.identical:
        return (
            "Fine-tuning changed nothing: both checkpoints are the same network. Try another finetune.lr, more blocks "
            "(finetune.unfreeze) or more images."
        )
    if gain.mcnemar_p is None:
        return (
            "NO VERDICT: training watched the test images (split.val_size is 0), which flatters: accuracy "
            f"{points(gain.accuracy)}, log-loss {signed(gain.loss)}."
        )
    bounds = points_range(gain.accuracy_low, gain.accuracy_high)
    return (
        f"Accuracy: {gain.verdict}, {points(gain.accuracy)} (95% interval {bounds}, {p_value(gain.mcnemar_p)}; "
        f"{plural(gain.fixed, 'image')} fixed, {gain.broken:,} broken); probabilities: {gain.loss_verdict}, "
        f"log-loss {signed(gain.loss)} ({loss_range(gain)}){describe_groups(gain)}."
    )


def loss_range(gain: Gain) -> str:
    """Return the interval of the gain in log-loss as `-0.1240 to -0.0170`."""
    if gain.loss_low is None or gain.loss_high is None:
        return f"no interval of fewer than {FEWEST} {'images' if gain.groups is None else 'groups'}"
    return f"{signed(gain.loss_low)} to {signed(gain.loss_high)}"


def describe_groups(gain: Gain) -> str:
    """Return a remark if whole groups were resampled, or ""."""
    return "" if gain.groups is None else f"; by {plural(gain.groups, 'whole group')}"
