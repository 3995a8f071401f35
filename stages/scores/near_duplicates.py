"""Near-identical pictures in the training and the test part: the test accuracy flatters where there are many."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.common.cli import StageError
from stages.common.files import read_rows, write_csv
from stages.common.format import percent
from stages.images.index import Entry
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions

_DECIMALS = 4
_COLUMNS = ["test", "train", "cosine"]
# What `similarity.find_similar` and `orientations.find_turned` find and what they do not (docs/results.md).
LOOKED_FOR = (
    "Looked for: copies that were saved again, made smaller, recoloured, mirrored or turned by 90, 180 or 270 degrees; "
    "not: cropped ones."
)


@dataclass(frozen=True)
class Similar:
    """What `similarity.find_similar` or `orientations.find_turned` finds among m test pictures.

    `pairs`: (position in test, position in train, cosine), of each test picture the 10 most similar at most;
    `count`: of all pairs;
    `paired`: whether a test picture is in a pair, (m,).
    """

    pairs: list[tuple[int, int, float]]
    count: int
    paired: NDArray[np.bool_]


@dataclass(frozen=True)
class Pair:
    """A test picture and another, of training or validation, that are nearly the same; `cosine`: as in `Similar`."""

    test: str
    train: str
    cosine: float


@dataclass(frozen=True)
class NearDuplicates:
    """How many pairs have a cosine of `threshold` or more, listed or not, and how many test pictures are in them.

    The accuracies are those on the test pictures that are in no pair, `None` if no picture is left.
    """

    threshold: float
    pairs: int
    test_pictures: int
    head_accuracy: float | None
    finetuned_accuracy: float | None


def name_pairs(similar: Similar, train: list[Entry], test: list[Entry]) -> list[Pair]:
    """Turn positions into paths, the most similar pair first."""
    named = [
        Pair(test[row].path, train[column].path, round(cosine, _DECIMALS)) for row, column, cosine in similar.pairs
    ]
    return sorted(named, key=lambda pair: (-pair.cosine, pair.test, pair.train))


def summarize(similar: Similar, threshold: float, predictions: Predictions) -> NearDuplicates:
    """Count the pairs, and score the models on the test pictures that are in none."""
    left = ~similar.paired
    head, finetuned = (
        float((predicted_labels(probabilities) == predictions.labels)[left].mean()) if left.any() else None
        for probabilities in predictions.models.values()
    )
    return NearDuplicates(threshold, similar.count, int(similar.paired.sum()), head, finetuned)


def describe_near_duplicates(found: NearDuplicates, count: int) -> str:
    """Put the result into one line; `count` is the number of all test pictures."""
    if not found.pairs:
        return f"No test picture was found to be nearly the same as a training or validation picture. {LOOKED_FOR}"
    verb = "is" if found.test_pictures == 1 else "are"
    line = f"{found.test_pictures} of {count} test pictures {verb} nearly the same as a training or validation picture"
    if found.head_accuracy is None or found.finetuned_accuracy is None:
        return f"{line}."
    accuracies = f"head {percent(found.head_accuracy)}, fine-tuned {percent(found.finetuned_accuracy)}"
    return f"{line}; without them: {accuracies}."


def write_near_duplicates(path: Path, pairs: list[Pair]) -> None:
    """Write `test,train,cosine`, whole or not at all; the header alone if there is no pair."""
    write_csv(path, _COLUMNS, ([pair.test, pair.train, f"{pair.cosine:.{_DECIMALS}f}"] for pair in pairs))


def read_near_duplicates(path: Path) -> list[Pair]:
    """Read what `write_near_duplicates` wrote.

    Raises:
        StageError: not such a file.
        OSError: not there.
    """
    try:
        return [Pair(test, train, float(cosine)) for test, train, cosine in read_rows(path, _COLUMNS)]
    except ValueError as error:
        raise StageError(
            f"{path}: not a file of near-duplicates ({error}); `dvc repro evaluate` writes it again"
        ) from error
