"""Predictions: their files, for the test images and for new ones; notable images; a comparison with the last commit."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from stages.common.cli import StageError
from stages.common.commits import read_versions
from stages.common.files import write_bytes, write_csv
from stages.common.format import percent, plural
from stages.scores.metrics import Floats, Labels, Probabilities, predicted_labels

# With more classes, the table for git omits most probabilities: 300 classes and 15,000 images would be 195 MB.
MOST_CLASSES = 20

Positions = list[int]
# Writes a row: the path, probabilities (classes,) or why the image cannot be read, and how unlike it is.
Row = Callable[[str, Probabilities | str, float], None]


@dataclass(frozen=True)
class Predictions:
    """The test images: paths and labels (n,); class names by label; both checkpoints' probabilities (n, classes).

    Files with the same bytes are one image: see `count_once`. `identical`: both checkpoints are the same network, which
    `models` then has once; set by the report.
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
    and `MODEL_true_probability` instead; `write_probabilities` writes the rest.
    """
    names, columns, every = ["path", "label"], [], np.arange(len(predictions.labels))
    for model, values in predictions.models.items():
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
    """Read what `write_probabilities` wrote; raises what `read_archive` does."""
    paths, labels, classes, *both = read_archive(path, "paths", "labels", "classes", "head", "finetuned")
    return Predictions(paths.tolist(), labels, classes.tolist(), *both)


def read_archive(path: Path, *names: str) -> list[NDArray[Any]]:
    """Return arrays of a NumPy archive of predictions; raises StageError if it is anything else."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return [content[name] for name in names]
    except (BadZipFile, ValueError, KeyError, EOFError, AttributeError) as error:
        raise StageError(f"{path}: not predictions ({error}); `dvc repro` writes it again") from error


def image_losses(labels: Labels, probabilities: Probabilities) -> Floats:
    """Return each image's log-loss in nats, (n,), at most 36, as scikit-learn's `log_loss` clips it.

    A probability near 1 is computed from the sum of the others, which keeps digits that a float near 1 loses.
    """
    true = probabilities[np.arange(len(labels)), labels]
    others = np.where(np.arange(probabilities.shape[1]) == labels[:, None], 0, probabilities).sum(axis=1)
    with np.errstate(divide="ignore"):
        from_others = -np.log1p(-np.minimum(others, 1))
    return np.where(true > 0.5, from_others, -np.log(np.maximum(true, np.finfo(np.float64).eps)))


def find_confused(predictions: Predictions, model: str) -> list[tuple[int, int, Positions]]:
    """Return pairs of a true label and a predicted one, with the positions of their images, most confident first.

    The pair with the most images comes first.
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
    """Return the positions of the images that fine-tuning fixed and broke, the largest changes first."""
    before, after = (predicted_labels(p) == predictions.labels for p in (predictions.head, predictions.finetuned))
    every = np.arange(len(predictions.labels))
    change = np.abs(predictions.finetuned - predictions.head)[every, predictions.labels]
    return _ordered(after & ~before, change), _ordered(before & ~after, change)


def _ordered(chosen: NDArray[np.bool_], values: Floats) -> Positions:
    positions = np.flatnonzero(chosen)
    order: Positions = positions[np.argsort(-values[positions], kind="stable")].tolist()
    return order


def compare_with_committed(table: Path, predictions: Predictions) -> str | None:
    """Return a sentence on the fine-tuned network's accuracy against that of the last committed result.

    Both use the current labels. `None` without such a result, shared images, or a difference.
    """
    labels, classes = dict(zip(predictions.paths, predictions.labels.tolist(), strict=True)), predictions.classes
    now = dict(zip(predictions.paths, predicted_labels(predictions.finetuned).tolist(), strict=True))
    versions = read_versions(table.parent, table.name)
    before = _read(versions[0][0], classes) if versions else {}
    if before == {path: (labels[path], now[path]) for path in now} or not (both := sorted(before.keys() & now.keys())):
        return None
    right = [(before[path][1] == labels[path], now[path] == labels[path]) for path in both]
    changed = sum(before[path][0] != labels[path] for path in both)
    accuracies = [percent(sum(one) / len(both)) for one in zip(*right, strict=True)]
    return (
        f"On {plural(len(both), 'test image')} of both this result and the last committed one"
        + f", by the labels of now ({changed} changed)" * bool(changed)
        + f": fine-tuned {accuracies[0]} -> {accuracies[1]}, {right.count((False, True))} fixed, "
        f"{right.count((True, False))} broken."
    )


def _read(content: str, classes: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return path -> label and the fine-tuned network's prediction, -1 for a class that no longer exists.

    Empty if it is no table of predictions. Without a column per class, the current classes are assumed.
    """
    (header, *rows) = list(csv.reader(io.StringIO(content, newline=""))) or [[]]
    label_of, start = {name: label for label, name in enumerate(classes)}, "finetuned."
    try:
        if "finetuned_prediction" in header:
            place = header.index("finetuned_prediction")
            return {row[0]: (int(row[1]), int(row[place])) for row in rows}
        places = [place for place, name in enumerate(header) if name.startswith(start)]
        labels = [label_of.get(header[place].removeprefix(start), -1) for place in places]
        values: Floats = np.array([[float(row[place]) for place in places] for row in rows])
        predicted = predicted_labels(values).tolist()
        return {row[0]: (labels[int(row[1])], labels[label]) for row, label in zip(rows, predicted, strict=True)}
    except (ValueError, IndexError):
        return {}


@contextmanager
def open_table(
    output: str, classes: Sequence[str], top: int | None, reject: float, tells_unlike: bool
) -> Iterator[Row]:
    """Open a table for predictions; each row is written at once, whole.

    CSV has `path,prediction,probability`, perhaps `unlike`, then the next most probable classes, `top` in all, or every
    class (`None`; a column each), then `problem`: why an image cannot be read. JSON lines have one object an image.
    `output`: a file, or `-`: CSV to the standard output; `reject`: below this probability no class is predicted, nor
    where `unlike` is above 1; 0: always one.
    """
    ending = ".csv" if output == "-" else Path(output).suffix.lower()
    if ending not in (".csv", ".jsonl"):
        raise StageError(f"--output: {output} should end in .csv or .jsonl, or be - for the standard output")
    if output == "-":
        sys.stdout.reconfigure(errors="surrogateescape", newline="")  # type: ignore[union-attr]
    shown = len(classes) if top is None else min(top, len(classes))
    following = [f"{name}_{place}" for place in range(2, shown + 1) for name in ("prediction", "probability")]
    more = [*["unlike"] * tells_unlike, *(classes if top is None else following)]
    columns = ["path", "prediction", "probability", *more, "problem"]
    encoding: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with nullcontext(sys.stdout) if output == "-" else Path(output).open("w", **encoding) as file:
        writer = csv.writer(file, lineterminator="\n")
        if ending == ".csv":
            writer.writerow(columns)

        def write(path: str, answer: Probabilities | str, unlike: float) -> None:
            if isinstance(answer, str):
                record: dict[str, Any] = {"problem": answer}
                cells: list[Any] = [*[""] * (len(columns) - 2), answer]
            else:
                # The label as in the scores, which on a tie need not be the first of the most probable ones.
                label, values = int(predicted_labels(answer[None])[0]), answer.tolist()
                order = [label, *(other for other in np.argsort(-answer, kind="stable").tolist() if other != label)]
                rejected = reject > 0 and (values[label] < reject or unlike > 1)
                names = [""] * len(classes) if rejected else classes
                record = {"prediction": names[label], "probability": values[label]}
                if tells_unlike:
                    record["unlike"] = float(unlike)
                pairs = [cell for other in order[1:shown] for cell in (names[other], values[other])]
                cells = [*record.values(), *(values if top is None else pairs), ""]
                record["probabilities"] = {classes[other]: values[other] for other in order[:shown]}
            if ending == ".csv":
                writer.writerow([path, *cells])
            else:
                file.write(json.dumps({"path": path, **record}, ensure_ascii=False) + "\n")
            file.flush()

        yield write
