"""Every prediction for the test images, the files they are kept in, and the images worth looking at."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from stages.common.cli import StageError
from stages.common.files import write_bytes, write_csv
from stages.scores.metrics import Labels, Probabilities, predicted_labels

# With more, the table for git does not have every probability: 300 classes and 15,000 images would make it 195 MB.
MOST_CLASSES = 20

_MODELS = ("head", "finetuned")

Positions = list[int]


@dataclass(frozen=True)
class Predictions:
    """The test images: paths and labels (n,); class names by label; both checkpoints' probabilities (n, classes).

    An image that is there several times, with the same bytes, is one image: see `count_once`. `identical`: both are the
    same network, and `models` has it once; who draws them sets it.
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


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write a table for git: `path,label`, then `MODEL.CLASS` for each model and class, with all digits.

    With more than 20 classes it has, for each model, `MODEL_prediction` (a label), `MODEL_probability` (of that label)
    and `MODEL_true_probability` instead; the rest is in what `write_probabilities` writes.
    """
    names, columns, every = ["path", "label"], [], np.arange(len(predictions.labels))
    for model in _MODELS:
        values: Probabilities = getattr(predictions, model)
        if len(predictions.classes) <= MOST_CLASSES:
            names += [f"{model}.{name}" for name in predictions.classes]
            columns += values.T.tolist()
        else:
            predicted = predicted_labels(values)
            names += [f"{model}_{name}" for name in ("prediction", "probability", "true_probability")]
            columns += [predicted.tolist(), *(values[every, of].tolist() for of in (predicted, predictions.labels))]
    write_csv(path, names, zip(predictions.paths, predictions.labels.tolist(), *columns, strict=True))


def write_probabilities(path: Path, predictions: Predictions) -> None:
    """Write the fields of `Predictions` as a NumPy archive (`.npz`); the same predictions give the same bytes."""
    content = io.BytesIO()
    paths, classes = (np.array(names, np.str_) for names in (predictions.paths, predictions.classes))
    numbers = {"labels": predictions.labels, "head": predictions.head, "finetuned": predictions.finetuned}
    np.savez(content, allow_pickle=False, paths=paths, classes=classes, **numbers)
    write_bytes(path, content.getbuffer())


def read_predictions(path: Path) -> Predictions:
    """Read what `write_probabilities` wrote.

    Raises:
        StageError: not such a file.
        OSError: not there.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            paths, classes = content["paths"].tolist(), content["classes"].tolist()
            return Predictions(paths, content["labels"], classes, content["head"], content["finetuned"])
    except (BadZipFile, ValueError, KeyError, EOFError, AttributeError) as error:
        raise StageError(f"{path}: not predictions ({error}); `dvc repro evaluate` writes it again") from error


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


def find_confused(predictions: Predictions, model: str) -> list[tuple[int, int, Positions]]:
    """Return the pairs of a true label and another that a checkpoint predicts instead, with their images' positions.

    The pair with the most images first, and of a pair the most confident prediction.
    """
    probabilities = predictions.models[model]
    predicted = predicted_labels(probabilities)
    pairs: dict[tuple[int, int], Positions] = {}
    for position in np.argsort(-probabilities.max(axis=1), kind="stable").tolist():
        pair = (int(predictions.labels[position]), int(predicted[position]))
        if pair[0] != pair[1]:
            pairs.setdefault(pair, []).append(position)
    return [(*pair, found) for pair, found in sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))]


def find_wrong(predictions: Predictions) -> Positions:
    """Return the positions of the fine-tuned checkpoint's mistakes, the most confident first."""
    wrong = predicted_labels(predictions.finetuned) != predictions.labels
    return _ordered(wrong, predictions.finetuned.max(axis=1))


def find_changed(predictions: Predictions) -> tuple[Positions, Positions]:
    """Return the positions of the images that fine-tuning fixed and broke.

    Each list has first the image whose true class changed its probability most.
    """
    before, after = (predicted_labels(p) == predictions.labels for p in (predictions.head, predictions.finetuned))
    every = np.arange(len(predictions.labels))
    change = np.abs(predictions.finetuned - predictions.head)[every, predictions.labels]
    return _ordered(after & ~before, change), _ordered(before & ~after, change)


def _ordered(chosen: NDArray[np.bool_], values: NDArray[np.float64]) -> Positions:
    """Return the chosen positions, that with the highest value first."""
    positions = np.flatnonzero(chosen)
    order: Positions = positions[np.argsort(-values[positions], kind="stable")].tolist()
    return order
