"""This result against the last committed one, on the test images of both: a test part that grew is another test."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.common.commits import read_versions
from stages.common.format import percent, plural
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions


def compare_with_committed(table: Path, predictions: Predictions) -> str | None:
    """Return a sentence on the fine-tuned network's accuracy against that of the last committed result.

    Both count by the labels of now: a label that was corrected is no merit of the network. `None` where there is no
    such result, none of the same images, or no difference.
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
    """Return path -> label and what the fine-tuned network predicted, -1 for a class that there no longer is.

    Nothing of what is no table of predictions. Where it has no column for each class, the classes are taken for those
    of now.
    """
    (header, *rows) = list(csv.reader(io.StringIO(content, newline=""))) or [[]]
    label_of, start = {name: label for label, name in enumerate(classes)}, "finetuned."
    try:
        if "finetuned_prediction" in header:
            place = header.index("finetuned_prediction")
            return {row[0]: (int(row[1]), int(row[place])) for row in rows}
        places = [place for place, name in enumerate(header) if name.startswith(start)]
        labels = [label_of.get(header[place].removeprefix(start), -1) for place in places]
        values: NDArray[np.float64] = np.array([[float(row[place]) for place in places] for row in rows])
        predicted = predicted_labels(values).tolist()
        return {row[0]: (labels[int(row[1])], labels[label]) for row, label in zip(rows, predicted, strict=True)}
    except (ValueError, IndexError):
        return {}
