"""The scores of every class, and the table that they are kept in: as metrics, `dvc exp show` has a column for each."""

import math
from dataclasses import dataclass

import numpy as np

from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions


@dataclass(frozen=True)
class ClassScores:
    """What both checkpoints are worth on the test images of one class.

    `support`: its test images; a precision is `None` where the class was never predicted, a recall where it has no
    test image.
    """

    label: int
    class_name: str
    support: int
    head_precision: float | None
    head_recall: float | None
    finetuned_precision: float | None
    finetuned_recall: float | None


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
