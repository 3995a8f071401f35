"""ROC and precision-recall curves, and the tables from which DVC plots them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.common.files import write_csv
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions

Values = NDArray[np.float64]

# Where curves are measured, so many that no jump looks slanted; a table has each fifth of these places.
GRID: Values = np.linspace(0, 1, 996)
_THINNED = 5


@dataclass(frozen=True)
class Curve:
    """One curve a checkpoint over the same `x`, which is `GRID`."""

    x: Values
    y: dict[str, Values]


def roc_curves(predictions: Predictions) -> Curve | None:
    """Return true positive rates over false positive rates, the mean over `counted_classes`; `None` without any."""
    return _average(predictions, _true_rates)


def precision_recall_curves(predictions: Predictions) -> Curve | None:
    """Return precisions over recalls, the mean over `counted_classes`; `None` without any."""
    return _average(predictions, _precisions)


def counted_classes(predictions: Predictions) -> list[int]:
    """Return the labels whose curves are averaged: of two classes the second, else each, one against the rest.

    A class without a test image, or with all of them, has no curve.
    """
    labels = [1] if len(predictions.classes) == 2 else range(len(predictions.classes))
    return [label for label in labels if 0 < np.count_nonzero(predictions.labels == label) < len(predictions.labels)]


def write_curves(folder: Path, predictions: Predictions) -> None:
    """Write `roc.csv`, `precision_recall.csv` and, with a row for each test image, `confusion.csv`."""
    for name, x, curve in (
        ("roc", "false_positive_rate", roc_curves(predictions)),
        ("precision_recall", "recall", precision_recall_curves(predictions)),
    ):
        rows = [] if curve is None else np.stack([curve.x, *curve.y.values()], axis=1)[::_THINNED].tolist()
        write_csv(folder / f"{name}.csv", [x, *predictions.models], rows)
    columns = (predictions.labels, *map(predicted_labels, predictions.models.values()))
    names = ([predictions.classes[label] for label in labels] for labels in zip(*columns, strict=True))
    write_csv(folder / "confusion.csv", ["actual", *predictions.models], names)


def _average(predictions: Predictions, curve: Callable[[NDArray[np.bool_], Values], Values]) -> Curve | None:
    labels, counted = predictions.labels, counted_classes(predictions)
    if not counted:
        return None
    sums = {
        name: sum((curve(labels == label, values[:, label]) for label in counted), np.zeros(len(GRID)))
        for name, values in predictions.models.items()
    }
    return Curve(GRID, {name: total / len(counted) for name, total in sums.items()})


def _true_rates(truth: NDArray[np.bool_], scores: Values) -> Values:
    from sklearn.metrics import roc_curve

    false_rates, true_rates, _ = roc_curve(truth, scores)
    rates: Values = np.interp(GRID, false_rates, true_rates)
    return rates


def _precisions(truth: NDArray[np.bool_], scores: Values) -> Values:
    from sklearn.metrics import precision_recall_curve

    # Recalls descend to 0, whose precision is made up; a place has the precision of the first recall that reaches it.
    precisions, recalls, _ = precision_recall_curve(truth, scores)
    reached: Values = precisions[:-1][len(recalls) - 2 - np.searchsorted(recalls[-2::-1], GRID)]
    return reached
