"""Labels that are probably wrong, by confident learning (Northcutt et al. 2021, https://arxiv.org/abs/1911.00068).

It needs the probabilities of images on which the network was not trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from stages.common.cli import StageError
from stages.scores.metrics import Labels, Probabilities
from stages.scores.predictions import Predictions

_MOST_LISTED = 1000
_DECIMALS = 4
# Two classes that are told apart in fewer cases than this (half of them by tossing a coin), with so many images each.
_HARDLY_APART, _ENOUGH = 0.65, 10


@dataclass(frozen=True)
class Judged:
    """Images with probabilities of networks that were not trained on them: paths, labels (n,), (n, classes)."""

    paths: list[str]
    labels: Labels
    probabilities: Probabilities


def judge_all(predictions: Predictions, out_of_fold: Path) -> Judged:
    """Return the test images, by the fine-tuned checkpoint, and those of the archive that `train_head` wrote.

    The latter has none where the head was not searched for. Raises StageError where it is no such file.
    """
    try:
        with np.load(out_of_fold, allow_pickle=False) as content:
            paths, labels, probabilities = content["paths"].tolist(), content["labels"], content["probabilities"]
        judged = Judged(predictions.paths, predictions.labels, predictions.finetuned)
        if paths:
            both = (judged.labels, labels), (judged.probabilities, probabilities)
            judged = Judged([*judged.paths, *paths], *map(np.concatenate, both))
        return judged
    except (BadZipFile, ValueError, KeyError, EOFError, AttributeError) as error:
        raise StageError(
            f"{out_of_fold}: not out-of-fold predictions ({error}); `dvc repro` writes it again"
        ) from error


def find_inseparable(judged: Judged, classes: Sequence[str]) -> list[tuple[str, str, float]]:
    """Return pairs of classes that are hardly told apart, the worst first, with how often they are.

    That is the mean over both classes of the fraction of images whose own class is more probable than the other one.
    """
    count = len(classes)
    wins = np.full((count, count), np.nan)
    for label in range(count):
        own = judged.probabilities[judged.labels == label]
        if len(own) >= _ENOUGH:
            wins[label] = (own[:, label, None] > own).mean(axis=0)
    apart = (wins + wins.T) / 2
    pairs = [(first, second) for first in range(count) for second in range(first + 1, count)]
    found = [(classes[a], classes[b], float(apart[a, b])) for a, b in pairs if apart[a, b] < _HARDLY_APART]
    return sorted(found, key=lambda pair: pair[2])


@dataclass(frozen=True)
class Suspect:
    """An image whose label is hardly believed, with the class that is believed instead; both with probabilities.

    `correction` is for who goes through them: filled in, their table is one for `data.corrections`.
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
    """Return the images of which another class is more probable than their label, the least believed label first.

    They are ranked by how much more probable it is, which is confident learning's normalized margin; 1,000 at most.
    """
    every = np.arange(len(labels))
    others = probabilities.copy()
    others[every, labels] = -np.inf
    suggestions = others.argmax(axis=1)
    margins = probabilities[every, labels] - probabilities[every, suggestions]
    order = [int(position) for position in np.argsort(margins, kind="stable") if margins[position] < 0]
    return [
        Suspect(
            paths[position],
            classes[labels[position]],
            round(float(probabilities[position, labels[position]]), _DECIMALS),
            classes[suggestions[position]],
            round(float(probabilities[position, suggestions[position]]), _DECIMALS),
        )
        for position in order[:_MOST_LISTED]
    ]


def estimate_wrong_labels(labels: Labels, probabilities: Probabilities) -> float:
    """Return how many labels are probably wrong: what lies off the diagonal of the confident joint, scaled to all.

    An image counts for a class if its probability is at least the mean probability of that class among the images
    with that label, which makes up for classes of which a network is surer than of others; if for several, for the
    most probable of them. Each label's row is scaled to the number of its images.
    """
    count = probabilities.shape[1]
    thresholds = np.array(
        [probabilities[labels == label, label].mean() if (labels == label).any() else np.inf for label in range(count)]
    )
    confident = np.where(probabilities >= thresholds, probabilities, -np.inf)
    counted = np.isfinite(confident.max(axis=1))
    joint = np.zeros((count, count))
    np.add.at(joint, (labels[counted], confident[counted].argmax(axis=1)), 1)
    rows = joint.sum(axis=1)
    sizes = np.bincount(labels, minlength=count)
    wrong = np.where(rows > 0, (rows - joint.diagonal()) / np.maximum(rows, 1), 0.0)
    return float((wrong * sizes).sum())
