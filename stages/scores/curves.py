"""ROC and precision-recall curves, and DVC's tables of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.common.files import write_csv
from stages.scores.metrics import Floats, predicted_labels
from stages.scores.predictions import Predictions

# Positions at which curves are measured, dense enough for steep jumps; tables have every fifth one.
GRID: Floats = np.linspace(0, 1, 996)
_THINNED = 5

# Checkpoint -> values at the positions of `GRID`; empty if no class has a curve.
Curves = dict[str, Floats]


def roc_curves(predictions: Predictions) -> Curves:
    """Return true positive rates over false positive rates, the mean over `counted_classes`."""
    from sklearn.metrics import roc_curve

    def true_rates(truth: NDArray[np.bool_], scores: Floats) -> Floats:
        false_rates, rates, _ = roc_curve(truth, scores)
        found: Floats = np.interp(GRID, false_rates, rates)
        return found

    return _average(predictions, true_rates)


def precision_recall_curves(predictions: Predictions) -> Curves:
    """Return precisions over recalls, the mean over `counted_classes`."""
    from sklearn.metrics import precision_recall_curve

    def precisions(truth: NDArray[np.bool_], scores: Floats) -> Floats:
        # Recalls descend to 0, where the precision is a convention; positions take that of the first recall above.
        found, recalls, _ = precision_recall_curve(truth, scores)
        reached: Floats = found[:-1][len(recalls) - 2 - np.searchsorted(recalls[-2::-1], GRID)]
        return reached

    return _average(predictions, precisions)


def counted_classes(predictions: Predictions) -> list[int]:
    """Return the labels with curves to average: of two classes the second, otherwise each against the rest.

    A class without a test image, or with all of them, has no curve.
    """
    labels = [1] if len(predictions.classes) == 2 else range(len(predictions.classes))
    return [label for label in labels if 0 < np.count_nonzero(predictions.labels == label) < len(predictions.labels)]


def _average(predictions: Predictions, curve: Callable[[NDArray[np.bool_], Floats], Floats]) -> Curves:
    labels, counted = predictions.labels, counted_classes(predictions)
    return {
        name: sum((curve(labels == label, values[:, label]) for label in counted), np.zeros(len(GRID))) / len(counted)
        for name, values in predictions.models.items()
        if counted
    }


def write_curves(folder: Path, predictions: Predictions) -> None:
    """Write `roc.csv`, `precision_recall.csv` and, with a row for each test image, `confusion.csv`."""
    for name, x, curves in (
        ("roc", "false_positive_rate", roc_curves(predictions)),
        ("precision_recall", "recall", precision_recall_curves(predictions)),
    ):
        rows = np.stack([GRID, *curves.values()], axis=1)[::_THINNED].tolist() if curves else []
        write_csv(folder / f"{name}.csv", [x, *predictions.models], rows)
    columns = (predictions.labels, *map(predicted_labels, predictions.models.values()))
    names = ([predictions.classes[label] for label in labels] for labels in zip(*columns, strict=True))
    write_csv(folder / "confusion.csv", ["actual", *predictions.models], names)
