"""Every prediction for the test images, the files they are kept in, and the images worth looking at."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from stages.common.cli import StageError
from stages.common.files import read_csv, write_bytes, write_csv
from stages.images.index import Entry
from stages.scores.metrics import Labels, Probabilities, predicted_labels

# With more, the table for git does not have every probability: 300 classes and 15,000 images would make it 195 MB.
MOST_CLASSES = 20

_MODELS = ("head", "finetuned")
_SHORT_COLUMNS = ("prediction", "probability", "true_probability")
_AGAIN = "`dvc repro evaluate` writes it again"

Positions = list[int]


@dataclass(frozen=True)
class Predictions:
    """The test images: paths and labels (n,); class names by label; both checkpoints' probabilities (n, classes).

    An image that is there several times, with the same bytes, is one image: see `count_once`. `identical`: both are
    the same network, and `models` has it once; who draws them sets it.
    """

    paths: list[str]
    labels: Labels
    classes: Sequence[str]
    head: Probabilities
    finetuned: Probabilities
    identical: bool = field(default=False, kw_only=True)

    @property
    def models(self) -> dict[str, Probabilities]:
        """The probabilities by checkpoint, in the order of training."""
        return {"finetuned": self.finetuned} if self.identical else {"head": self.head, "finetuned": self.finetuned}


def count_once(entries: list[Entry]) -> list[Entry]:
    """Return the first of each group of files with the same bytes; the others would count one image several times."""
    first: dict[str, Entry] = {}
    for entry in entries:
        first.setdefault(entry.sha256, entry)
    return list(first.values())


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write `path,label`, then `MODEL.CLASS` for each model and class, whole or not at all.

    Probabilities are written with all their digits: every score can be computed again from this file. With more than 20
    classes it has, for each model, `MODEL_prediction` (a label), `MODEL_probability` (of that label) and
    `MODEL_true_probability` instead; the rest is in what `write_probabilities` writes.
    """
    models = list(predictions.models.values())
    if len(predictions.classes) > MOST_CLASSES:
        header = _short_header()
        columns = [column for values in models for column in _short_columns(predictions.labels, values)]
    else:
        header = _header(predictions.classes)
        columns = [column.tolist() for values in models for column in values.T]
    write_csv(path, header, zip(predictions.paths, predictions.labels.tolist(), *columns, strict=True))


def write_probabilities(path: Path, predictions: Predictions) -> None:
    """Write all predictions as a NumPy archive (`.npz`) of the fields of `Predictions`, whole or not at all.

    The same predictions give the same bytes.
    """
    content = io.BytesIO()
    np.savez(
        content,
        paths=np.array(predictions.paths, dtype=np.str_),
        labels=predictions.labels,
        classes=np.array(predictions.classes, dtype=np.str_),
        head=predictions.head,
        finetuned=predictions.finetuned,
    )
    write_bytes(path, content.getbuffer())


def read_predictions(path: Path, probabilities: Path) -> Predictions:
    """Read what `write_predictions` wrote; from what `write_probabilities` wrote where that has not all of it.

    Raises:
        StageError: not such files, or not of the same run.
        OSError: not there.
    """
    try:
        header, rows = read_csv(path)
        paths, labels = [row[0] for row in rows], np.array([int(row[1]) for row in rows], dtype=np.int64)
        if header == _short_header():
            return _read_probabilities(probabilities, path, paths, labels)
        count = (len(header) - 2) // 2
        classes = [column.removeprefix("head.") for column in header[2 : 2 + count]]
        if header != _header(classes):
            raise ValueError("unexpected columns")
        values = np.array([row[2:] for row in rows], dtype=np.float64).reshape(len(rows), 2 * count)
    except (ValueError, IndexError) as error:
        raise StageError(f"{path}: not a file of predictions ({error}); {_AGAIN}") from error
    return Predictions(paths, labels, classes, values[:, :count], values[:, count:])


def _read_probabilities(path: Path, table: Path, paths: list[str], labels: Labels) -> Predictions:
    try:
        with np.load(path, allow_pickle=False) as content:
            read = Predictions(
                content["paths"].tolist(),
                content["labels"],
                content["classes"].tolist(),
                content["head"],
                content["finetuned"],
            )
    except (BadZipFile, ValueError, KeyError, EOFError, AttributeError) as error:
        raise StageError(f"{path}: not a file of probabilities ({error}); {_AGAIN}") from error
    if read.paths != paths or not np.array_equal(read.labels, labels):
        raise StageError(f"{path}: not the images of {table}; `dvc repro evaluate` writes both again")
    return read


def _header(classes: Sequence[str]) -> list[str]:
    return ["path", "label", *(f"{model}.{name}" for model in _MODELS for name in classes)]


def _short_header() -> list[str]:
    return ["path", "label", *(f"{model}_{column}" for model in _MODELS for column in _SHORT_COLUMNS)]


def _short_columns(labels: Labels, probabilities: Probabilities) -> list[list[float]]:
    """Return what `_SHORT_COLUMNS` names, (n,) each."""
    every, predicted = np.arange(len(labels)), predicted_labels(probabilities)
    return [predicted.tolist(), probabilities[every, predicted].tolist(), probabilities[every, labels].tolist()]


def image_losses(labels: Labels, probabilities: Probabilities) -> NDArray[np.float64]:
    """Return each image's log-loss in nats, (n,), at most 36, as scikit-learn's `log_loss` clips it.

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


def find_confused(predictions: Predictions, model: str) -> list[tuple[int, int, Positions]]:
    """Return the pairs of a true label and another that a checkpoint predicts instead, with their images' positions.

    The pair with the most images first, and of a pair the most confident prediction.
    """
    probabilities = predictions.models[model]
    predicted = predicted_labels(probabilities)
    confidence = probabilities.max(axis=1)
    pairs: dict[tuple[int, int], Positions] = {}
    for position in np.argsort(-confidence, kind="stable").tolist():
        pair = (int(predictions.labels[position]), int(predicted[position]))
        if pair[0] != pair[1]:
            pairs.setdefault(pair, []).append(position)
    return [(*pair, found) for pair, found in sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))]


def find_changed(predictions: Predictions) -> tuple[Positions, Positions]:
    """Return the positions of the images that fine-tuning fixed and broke.

    Each list has first the image whose true class changed its probability most.
    """
    before, after = (
        predicted_labels(values) == predictions.labels for values in (predictions.head, predictions.finetuned)
    )
    every = np.arange(len(predictions.labels))
    change = np.abs(predictions.finetuned - predictions.head)[every, predictions.labels]

    def ordered(chosen: NDArray[np.bool_]) -> Positions:
        positions = np.flatnonzero(chosen)
        return [int(position) for position in positions[np.argsort(-change[positions], kind="stable")]]

    return ordered(after & ~before), ordered(before & ~after)
