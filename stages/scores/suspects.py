"""Labels that are probably wrong, by confident learning (Northcutt et al. 2021, https://arxiv.org/abs/1911.00068).

The network must not have been trained on the images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.scores.metrics import Labels, Probabilities
from stages.scores.predictions import Predictions, read_archive

_MOST_LISTED = 1000
_DECIMALS = 4
# Classes are inseparable below this fraction of right pairwise decisions (by chance: half), with so many images each.
_HARDLY_APART, _ENOUGH = 0.65, 10


# Paths, labels (n,), and probabilities (n, classes) by networks that were not trained on the images.
Judged = tuple[list[str], Labels, Probabilities]


def judge_all(predictions: Predictions, out_of_fold: Path) -> Judged:
    """Return the test images, with the fine-tuned checkpoint's probabilities, and those of `train_head`'s archive.

    The archive is empty without a head search. Raises what `read_archive` does.
    """
    paths, labels, probabilities = read_archive(out_of_fold, "paths", "labels", "probabilities")
    if not len(paths):
        return predictions.paths, predictions.labels, predictions.finetuned
    both = np.concatenate([predictions.finetuned, probabilities])
    return [*predictions.paths, *paths.tolist()], np.concatenate([predictions.labels, labels]), both


def find_inseparable(judged: Judged, classes: Sequence[str]) -> list[tuple[str, str, float]]:
    """Return pairs of classes that are hardly told apart, the worst first, with the fraction of right decisions.

    It is the mean over both classes of the fraction of images whose own class is more probable than the other.
    """
    _, labels, probabilities = judged
    wins = np.full((len(classes), len(classes)), np.nan)
    for label in range(len(classes)):
        own = probabilities[labels == label]
        if len(own) >= _ENOUGH:
            wins[label] = (own[:, label, None] > own).mean(axis=0)
    apart = (wins + wins.T) / 2
    found = [(classes[a], classes[b], float(apart[a, b])) for a, b in np.argwhere(np.triu(apart < _HARDLY_APART, 1))]
    return sorted(found, key=lambda pair: pair[2])


@dataclass(frozen=True)
class Suspect:
    """An image with an improbable label, and the class that is more probable; both with probabilities.

    `correction` is for the reader to fill in: the table then serves as `data.corrections`.
    """

    path: str
    label: str
    label_probability: float
    suggestion: str
    suggestion_probability: float
    correction: str | None = None


def find_suspects(
    paths: Sequence[str], labels: Labels, probabilities: Probabilities, classes: Sequence[str]
) -> list[Suspect]:
    """Return the images with a class more probable than their label, the least probable label first.

    They are ranked by how much more probable it is, which is confident learning's normalized margin; 1,000 at most.
    """
    every = np.arange(len(labels))
    others = probabilities.copy()
    others[every, labels] = -np.inf
    suggestions = others.argmax(axis=1)
    values, highest = probabilities[every, labels], probabilities[every, suggestions]
    margins = values - highest
    return [
        Suspect(
            *(paths[position], classes[labels[position]], round(float(values[position]), _DECIMALS)),
            *(classes[suggestions[position]], round(float(highest[position]), _DECIMALS)),
        )
        for position in np.argsort(margins, kind="stable")[:_MOST_LISTED].tolist()
        if margins[position] < 0
    ]


def estimate_wrong_labels(labels: Labels, probabilities: Probabilities) -> float:
    """Estimate how many labels are wrong: the off-diagonal sum of the confident joint, scaled to all images.

    An image counts for a class if its probability is at least the mean probability of that class among the images
    with that label, since networks are more confident of some classes; if for several, for the most probable one. Each
    label's row is scaled to the number of its images.
    """
    count = probabilities.shape[1]
    own = [probabilities[labels == label, label] for label in range(count)]
    thresholds = [values.mean() if len(values) else np.inf for values in own]
    confident = np.where(probabilities >= thresholds, probabilities, -np.inf)
    counted = np.isfinite(confident.max(axis=1))
    rows = np.bincount(labels[counted], minlength=count)
    off = np.bincount(labels[counted & (confident.argmax(axis=1) != labels)], minlength=count)
    return float((off / np.maximum(rows, 1) * [len(values) for values in own]).sum())
