"""The scores of every class, and the table that they are kept in: as metrics, `dvc exp show` has a column for each."""

import math
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from stages.common.cli import StageError
from stages.common.files import read_rows, write_csv
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions


@dataclass(frozen=True)
class ClassScores:
    """What both checkpoints are worth on the test pictures of one class.

    `support`: its test pictures; a precision is `None` where the class was never predicted, a recall where it has no
    test picture.
    """

    label: int
    name: str
    support: int
    head_precision: float | None
    head_recall: float | None
    finetuned_precision: float | None
    finetuned_recall: float | None


_COLUMNS = [field.name.replace("name", "class") for field in fields(ClassScores)]


def score_classes(predictions: Predictions) -> list[ClassScores]:
    """Return the scores of every class, in the order of their labels."""
    from sklearn.metrics import precision_recall_fscore_support

    scores = []
    for probabilities in predictions.models.values():
        precision, recall, _, support = precision_recall_fscore_support(
            predictions.labels,
            predicted_labels(probabilities),
            labels=np.arange(len(predictions.classes)),
            zero_division=np.nan,
        )
        scores += [precision.tolist(), recall.tolist()]
    return [
        ClassScores(label, name, count, *(None if math.isnan(value) else value for value in values))
        for label, (name, count, *values) in enumerate(zip(predictions.classes, support.tolist(), *scores, strict=True))
    ]


def write_classes(path: Path, classes: list[ClassScores]) -> None:
    """Write `label,class,support`, then precision and recall of both checkpoints, whole or not at all.

    An undefined number is an empty cell.
    """
    write_csv(path, _COLUMNS, map(astuple, classes))


def read_classes(path: Path) -> list[ClassScores]:
    """Read what `write_classes` wrote.

    Raises:
        StageError: not such a file.
        OSError: not there.
    """
    try:
        return [
            ClassScores(int(label), name, int(support), *(float(value) if value else None for value in values))
            for label, name, support, *values in read_rows(path, _COLUMNS)
        ]
    except (ValueError, TypeError) as error:
        raise StageError(f"{path}: not a table of classes ({error}); `dvc repro evaluate` writes it again") from error
