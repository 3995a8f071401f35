"""What the probabilities are worth, and the file that they are kept in."""

import csv
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, log_loss

from stages.common.files import write_text
from stages.common.index import Entry

Probabilities = NDArray[np.float64]


def predict(probabilities: Probabilities) -> NDArray[np.int64]:
    """Return the predicted labels (n,) for probabilities (n, classes); of two, 1 from a probability of 0.5 up."""
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= 0.5).astype(np.int64)
    labels: NDArray[np.int64] = probabilities.argmax(axis=1)
    return labels


def score(labels: NDArray[np.int64], probabilities: Probabilities) -> dict[str, float]:
    """Return `accuracy`, in [0, 1], and `loss`, the mean log-loss in nats.

    Args:
        labels: (n,).
        probabilities: (n, classes).
    """
    return {
        "accuracy": float(accuracy_score(labels, predict(probabilities))),
        "loss": float(log_loss(labels, probabilities, labels=np.arange(probabilities.shape[1]))),
    }


def compare(head: dict[str, float], finetuned: dict[str, float]) -> dict[str, float]:
    """Return what fine-tuning added to each score. A gain in loss is negative where fine-tuning lowered the loss."""
    return {name: finetuned[name] - head[name] for name in head}


def write_predictions(
    path: Path, entries: list[Entry], classes: tuple[str, ...], models: dict[str, Probabilities]
) -> None:
    """Write `path,label`, then `MODEL.CLASS` for each model and class, whole or not at all.

    Probabilities are written with all their digits: every score can be computed again from this file.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", *(f"{model}.{name}" for model in models for name in classes)])
    for position, entry in enumerate(entries):
        row = (float(value) for probabilities in models.values() for value in probabilities[position])
        writer.writerow([entry.path, entry.label, *row])
    write_text(path, text.getvalue())
