"""This result against the last committed one, on the test images of both: a test part that grew is another test."""

import csv
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.common.commits import read_versions
from stages.common.format import percent, plural
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions


def compare_with_committed(table: Path, predictions: Predictions) -> str | None:
    """Return a sentence on the fine-tuned network's accuracy against that of the last committed result.

    Each counts by the labels of its commit. `None` where there is none, none of the same images, or no difference.
    """
    right = predicted_labels(predictions.finetuned) == predictions.labels
    now = dict(zip(predictions.paths, right.tolist(), strict=True))
    versions = read_versions(table.parent, table.name)
    before = _read(versions[0][0]) if versions else {}
    if before == now or not (both := sorted(before.keys() & now.keys())):
        return None
    fixed, broken = (
        sum(one[path] and not other[path] for path in both) for one, other in ((now, before), (before, now))
    )
    accuracies = [percent(sum(one[path] for path in both) / len(both)) for one in (before, now)]
    return (
        f"On {plural(len(both), 'test image')} of both this result and the last committed one: fine-tuned "
        f"{accuracies[0]} -> {accuracies[1]}, {fixed} fixed, {broken} broken."
    )


def _read(content: str) -> dict[str, bool]:
    """Return path -> whether the fine-tuned network was right; nothing of what is no table of predictions."""
    (header, *rows) = list(csv.reader(io.StringIO(content, newline=""))) or [[]]
    try:
        if "finetuned_prediction" in header:
            place = header.index("finetuned_prediction")
            return {row[0]: row[place] == row[1] for row in rows}
        places = [place for place, name in enumerate(header) if name.startswith("finetuned.")]
        values: NDArray[np.float64] = np.array([[float(row[place]) for place in places] for row in rows])
        return {row[0]: label == int(row[1]) for row, label in zip(rows, predicted_labels(values), strict=True)}
    except (ValueError, IndexError):
        return {}
