"""Near-identical pictures in the training and the test part: the test accuracy flatters where there are many."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.common.files import read_csv, write_csv
from stages.common.stage import StageError
from stages.common.words import percent
from stages.pictures.index import Entry
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions

_DECIMALS = 4
_COLUMNS = ["test", "train", "cosine"]


@dataclass(frozen=True)
class Pair:
    """A test picture and a training picture that are nearly the same; `cosine` as in `similarity.find_similar`."""

    test: str
    train: str
    cosine: float


@dataclass(frozen=True)
class NearDuplicates:
    """How many pairs have a cosine of `threshold` or more, and how many test pictures are in them.

    The accuracies are those on the test pictures that are in no pair, `None` if no picture is left.
    """

    threshold: float
    pairs: int
    test_pictures: int
    head_accuracy: float | None
    finetuned_accuracy: float | None


def name_pairs(pairs: Iterable[tuple[int, int, float]], train: list[Entry], test: list[Entry]) -> list[Pair]:
    """Turn what `similarity.find_similar` returns into paths, the most similar pair first."""
    named = [Pair(test[row].path, train[column].path, round(cosine, _DECIMALS)) for row, column, cosine in pairs]
    return sorted(named, key=lambda pair: (-pair.cosine, pair.test, pair.train))


def summarize(pairs: list[Pair], threshold: float, predictions: Predictions) -> NearDuplicates:
    """Count the pairs, and score the models on the test pictures that are in none."""
    paired = {pair.test for pair in pairs}
    left = np.array([path not in paired for path in predictions.paths])
    head, finetuned = (
        float((predicted_labels(probabilities) == predictions.labels)[left].mean()) if left.any() else None
        for probabilities in predictions.models.values()
    )
    return NearDuplicates(threshold, len(pairs), len(paired), head, finetuned)


def describe_near_duplicates(found: NearDuplicates, count: int) -> str:
    """Put the result into one line; `count` is the number of all test pictures."""
    if not found.pairs:
        return "No test picture is nearly the same as a training picture."
    verb = "is" if found.test_pictures == 1 else "are"
    line = f"{found.test_pictures} of {count} test pictures {verb} nearly the same as a training picture"
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
        columns, rows = read_csv(path)
        if columns != _COLUMNS:
            raise ValueError("unexpected columns")
        return [Pair(test, train, float(cosine)) for test, train, cosine in rows]
    except ValueError as error:
        raise StageError(
            f"{path}: not a file of near-duplicates ({error}); `dvc repro evaluate` writes it anew"
        ) from error
