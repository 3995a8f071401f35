"""ROC and precision-recall curves, and the tables from which DVC plots them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.common.files import write_csv
from stages.scores.metrics import Labels, Probabilities, predicted_labels
from stages.scores.predictions import Predictions

MAX_ROWS = 200

_Values = NDArray[np.float64]
# x -> the curve's values just left and just right of it, where it may jump.
_Sides = Callable[[_Values], tuple[_Values, _Values]]


@dataclass(frozen=True)
class Curve:
    """One curve a checkpoint over the same x, (m,), ascending; where a curve jumps, x is there twice."""

    x: _Values
    y: dict[str, _Values]


def roc_curves(predictions: Predictions) -> Curve | None:
    """Return true positive rates over false positive rates, as `_average` says; `None` where no class has both."""
    return _average(predictions, _roc_sides)


def precision_recall_curves(predictions: Predictions) -> Curve | None:
    """Return precisions over recalls, as `_average` says; `None` where no class has both.

    Steps, whose area is scikit-learn's `average_precision_score`.
    """
    return _average(predictions, _precision_sides)


def counted_classes(predictions: Predictions) -> list[int]:
    """Return the labels whose curves are averaged: of two classes the second, else each, one against the rest.

    A class without a test image, or with all of them, has no curve.
    """
    labels = [1] if len(predictions.classes) == 2 else range(len(predictions.classes))
    return [label for label in labels if 0 < np.count_nonzero(predictions.labels == label) < len(predictions.labels)]


def write_curves(folder: Path, predictions: Predictions) -> None:
    """Write `roc.csv`, `precision_recall.csv` and `confusion.csv`, each whole or not at all.

    The curves have at most 200 rows, the first and the last among them; `confusion.csv` has one row a test image.
    """
    for name, x, curve in (
        ("roc", "false_positive_rate", roc_curves(predictions)),
        ("precision_recall", "recall", precision_recall_curves(predictions)),
    ):
        rows = np.empty((0, 3)) if curve is None else np.stack([curve.x, *curve.y.values()], axis=1)
        kept = np.unique(np.linspace(0, max(len(rows) - 1, 0), MAX_ROWS).round().astype(int))[: len(rows)]
        write_csv(folder / f"{name}.csv", [x, *predictions.models], rows[kept].tolist() if len(rows) else [])
    columns = (predictions.labels, predicted_labels(predictions.head), predicted_labels(predictions.finetuned))
    names = ([predictions.classes[label] for label in labels] for labels in zip(*columns, strict=True))
    write_csv(folder / "confusion.csv", ["actual", *predictions.models], names)


def _average(
    predictions: Predictions, sides_of: Callable[[NDArray[np.bool_], _Values], tuple[_Values, _Sides]]
) -> Curve | None:
    """Average the curves of `counted_classes`, each class weighing the same (macro)."""
    models = {
        name: [sides_of(truth, scores) for truth, scores in _one_against_rest(predictions.labels, values, predictions)]
        for name, values in predictions.models.items()
    }
    jumps = [x for curves in models.values() for x, _ in curves]
    if not jumps:
        return None
    x = np.unique(np.concatenate(jumps))
    y = {}
    for name, curves in models.items():
        total = np.zeros((2, len(x)))
        for _, sides in curves:  # one after the other: together they may not fit into memory
            total += sides(x)
        y[name] = (total / len(curves)).T.ravel()
    return Curve(np.repeat(x, 2), y)


def _one_against_rest(
    labels: Labels, probabilities: Probabilities, predictions: Predictions
) -> Iterator[tuple[NDArray[np.bool_], _Values]]:
    for label in counted_classes(predictions):
        yield labels == label, probabilities[:, label]


def _roc_sides(truth: NDArray[np.bool_], scores: _Values) -> tuple[_Values, _Sides]:
    from sklearn.metrics import roc_curve

    false_rates, true_rates, _ = roc_curve(truth, scores)

    def sides(x: _Values) -> tuple[_Values, _Values]:
        # Of several values at one x, np.interp takes the last.
        left, right = (np.interp(values, false_rates, true_rates) for values in (np.nextafter(x, -1), x))
        return left, right

    return false_rates, sides


def _precision_sides(truth: NDArray[np.bool_], scores: _Values) -> tuple[_Values, _Sides]:
    from sklearn.metrics import precision_recall_curve

    precisions, recalls, _ = precision_recall_curve(truth, scores)
    # From the highest threshold down; of several precisions at one recall, the first reached, which is the highest.
    recalls, first = np.unique(recalls[::-1], return_index=True)
    # The area begins with the precision of the first recall above 0.
    precisions = precisions[::-1][first][1:]

    def sides(x: _Values) -> tuple[_Values, _Values]:
        left, right = (
            precisions[np.minimum(np.searchsorted(recalls[1:], x, side), len(precisions) - 1)]
            for side in ("left", "right")
        )
        return left, right

    return recalls, sides
