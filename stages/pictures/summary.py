"""`split.json`: what the split made of the pictures."""

from collections.abc import Sequence
from typing import Any

from stages.pictures.index import PARTS

# DVC takes each number in nested objects for a metric of its own and shows it in a row or a column; it passes lists by.
_MOST_CLASSES = 20

ClassCounts = dict[str, dict[str, int]]


def describe_classes(counts: ClassCounts) -> dict[str, Any]:
    """Return the number of pictures of each part, and of each class and part, as `split.json` has them.

    Up to 20 classes they are DVC's metrics, `classes`; more are a list, `class_counts`, that `dvc metrics diff` and
    `dvc exp show` pass by.
    """
    parts = {part: sum(numbers[part] for numbers in counts.values()) for part in PARTS}
    if len(counts) <= _MOST_CLASSES:
        return {"parts": parts, "classes": counts}
    return {"parts": parts, "class_counts": [{"class": name, **numbers} for name, numbers in counts.items()]}


def class_counts(split: dict[str, Any]) -> ClassCounts:
    """Return class -> part -> number of pictures, from the content of a `split.json`."""
    if "classes" in split:
        return dict(split["classes"])
    rows: Sequence[dict[str, Any]] = split["class_counts"]
    return {row["class"]: {part: row[part] for part in PARTS} for row in rows}
