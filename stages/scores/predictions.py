"""Every prediction for the test pictures, the file they are kept in, and the pictures worth looking at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.common.files import read_csv, write_csv
from stages.common.stage import StageError
from stages.scores.metrics import Labels, Probabilities, predicted_labels

Positions = list[int]


@dataclass(frozen=True)
class Predictions:
    """The test pictures: paths and labels (n,); class names by label; both checkpoints' probabilities (n, classes)."""

    paths: list[str]
    labels: Labels
    classes: Sequence[str]
    head: Probabilities
    finetuned: Probabilities

    @property
    def models(self) -> dict[str, Probabilities]:
        """The probabilities by checkpoint, in the order of training."""
        return {"head": self.head, "finetuned": self.finetuned}


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write `path,label`, then `MODEL.CLASS` for each model and class, whole or not at all.

    Probabilities are written with all their digits: every score can be computed again from this file.
    """
    columns = (
        predictions.paths,
        predictions.labels.tolist(),
        predictions.head.tolist(),
        predictions.finetuned.tolist(),
    )
    rows = ([name, label, *head, *finetuned] for name, label, head, finetuned in zip(*columns, strict=True))
    write_csv(path, _columns(predictions.classes), rows)


def _columns(classes: Sequence[str]) -> list[str]:
    return ["path", "label", *(f"{model}.{name}" for model in ("head", "finetuned") for name in classes)]


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote.

    Raises:
        StageError: not such a file.
        OSError: not there.
    """
    try:
        header, rows = read_csv(path)
        count = (len(header) - 2) // 2
        classes = [column.removeprefix("head.") for column in header[2 : 2 + count]]
        if header != _columns(classes):
            raise ValueError("unexpected columns")
        labels = np.array([int(row[1]) for row in rows], dtype=np.int64)
        values = np.array([row[2:] for row in rows], dtype=np.float64).reshape(len(rows), 2 * count)
    except (ValueError, IndexError) as error:
        raise StageError(f"{path}: not a file of predictions ({error}); `dvc repro evaluate` writes it anew") from error
    return Predictions([row[0] for row in rows], labels, classes, values[:, :count], values[:, count:])


def picture_losses(labels: Labels, probabilities: Probabilities) -> NDArray[np.float64]:
    """Return each picture's log-loss in nats, (n,), at most 36, as scikit-learn's `log_loss` clips it.

    A probability near 1 is counted from what the other classes leave, which keeps digits that the float does not:
    1 - 1e-20 is 1.
    """
    true = probabilities[np.arange(len(labels)), labels]
    others = np.where(np.arange(probabilities.shape[1]) == labels[:, None], 0, probabilities).sum(axis=1)
    with np.errstate(divide="ignore"):
        from_others = -np.log1p(-np.minimum(others, 1))
    return np.where(true > 0.5, from_others, -np.log(np.maximum(true, np.finfo(np.float64).eps)))


def find_wrong(predictions: Predictions) -> Positions:
    """Return the positions of the fine-tuned checkpoint's mistakes, the most confident first."""
    predicted = predicted_labels(predictions.finetuned)
    wrong = np.flatnonzero(predicted != predictions.labels)
    confidence = predictions.finetuned[wrong, predicted[wrong]]
    return [int(position) for position in wrong[np.argsort(-confidence, kind="stable")]]


def find_changed(predictions: Predictions) -> tuple[Positions, Positions]:
    """Return the positions of the pictures that fine-tuning fixed and broke.

    Each list has first the picture whose true class changed its probability most.
    """
    right = {name: predicted_labels(values) == predictions.labels for name, values in predictions.models.items()}
    every = np.arange(len(predictions.labels))
    change = np.abs(predictions.finetuned - predictions.head)[every, predictions.labels]

    def ordered(chosen: NDArray[np.bool_]) -> Positions:
        positions = np.flatnonzero(chosen)
        return [int(position) for position in positions[np.argsort(-change[positions], kind="stable")]]

    return ordered(right["finetuned"] & ~right["head"]), ordered(right["head"] & ~right["finetuned"])
