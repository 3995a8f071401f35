"""The test result: scores of both checkpoints, overall and by class, the gain, and contamination of the test.

`python -m stages.scores.evaluation metrics` prints it again.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.cli import run
from stages.common.files import read_record, write_json, write_record
from stages.common.format import enumerate_names, number, percent, percent_range, plural, points, points_range, signed
from stages.images.index import PARTS, Groups, class_counts
from stages.images.near_duplicates import LOOKED_FOR, THRESHOLD, Leak
from stages.scores.metrics import RESAMPLES, Scores, predicted_labels, resample_means, score
from stages.scores.predictions import Predictions
from stages.scores.verdict import Gain, compare, describe_gain

_FEW = 20
_UNEQUAL = 10
_MOST_NAMED = 3


@dataclass(frozen=True)
class ClassScores:
    """Scores of both checkpoints on the `support` test images of one class.

    A precision is `None` if the class was never predicted, a recall if it has no test image. Stored as a table, since
    `dvc exp show` would have a column for each metric.
    """

    label: int
    class_name: str
    support: int
    head_precision: float | None
    head_recall: float | None
    finetuned_precision: float | None
    finetuned_recall: float | None


def score_classes(predictions: Predictions) -> list[ClassScores]:
    """Return the scores of every class, in the order of their labels."""
    from sklearn.metrics import precision_recall_fscore_support

    scores, every = [], range(len(predictions.classes))
    for values in predictions.models.values():
        scores += precision_recall_fscore_support(
            predictions.labels, predicted_labels(values), labels=every, zero_division=np.nan
        )[:2]
    columns = ([None if math.isnan(value) else value for value in column.tolist()] for column in scores)
    support = np.bincount(predictions.labels, minlength=len(every)).tolist()
    return list(map(ClassScores, every, predictions.classes, support, *columns))


@dataclass(frozen=True)
class BalancedGain:
    """Balanced accuracy, the mean recall of the tested classes, of both checkpoints, and the gain.

    The 95% interval of `gain` is a paired bootstrap's over the images, or groups, of each class.
    """

    head: float
    finetuned: float
    gain: float
    gain_low: float
    gain_high: float


def compare_balanced(predictions: Predictions, groups: Groups | None = None) -> BalancedGain | None:
    """Return the gain in balanced accuracy if classes are unequal by more than 10 to 1, otherwise `None`."""
    counts = np.bincount(predictions.labels, minlength=len(predictions.classes))
    tested = np.flatnonzero(counts)
    if counts[tested].max() <= _UNEQUAL * counts[tested].min():
        return None
    right = np.stack([predicted_labels(values) == predictions.labels for values in predictions.models.values()])
    changes = np.subtract(right[1], right[0], dtype=np.float64)
    chance, gains, recalls = np.random.default_rng(0), np.zeros(RESAMPLES), []
    for label in tested:
        own = predictions.labels == label
        gains += resample_means(changes[own], None if groups is None else groups[own], chance) / len(tested)
        recalls.append(right[:, own].mean(axis=1))
    head, finetuned = (float(np.mean(own)) for own in zip(*recalls, strict=True))
    low, high = np.percentile(gains, [2.5, 97.5]).tolist()
    return BalancedGain(head, finetuned, finetuned - head, low, high)


def count_parts(split: dict[str, Any]) -> dict[str, int]:
    """Return the number of images of each part, from the content of `split.json`."""
    return {part: sum(numbers[part] for numbers in class_counts(split).values()) for part in PARTS}


def find_remarks(classes: Sequence[ClassScores], balanced: BalancedGain | None, split: dict[str, Any]) -> list[str]:
    """Return remarks for the console and the report, if any. `split`: `split.json`."""
    tested = [scores for scores in classes if scores.support]
    remarks = []
    if balanced is not None:
        most, least = (function(scores.support for scores in tested) for function in (max, min))
        values = (
            f"{percent(balanced.head)} before and {percent(balanced.finetuned)} after fine-tuning "
            f"({points(balanced.gain)}, 95% interval {points_range(balanced.gain_low, balanced.gain_high)})"
        )
        if balanced.gain_low == balanced.gain_high:  # no image changed, so there is nothing to resample
            values = percent(balanced.finetuned)
        remarks.append(
            f"The classes are unequal, {most:,} test images to {least:,}: look at the balanced accuracy, {values}."
        )
    for what, named in (
        ("Never predicted by the fine-tuned network", [one for one in tested if one.finetuned_precision is None]),
        (f"Fewer than {_FEW} test images, which say little of a class", [one for one in tested if one.support < _FEW]),
        ("Without test images", [one for one in classes if not one.support]),
    ):
        if named:
            remarks.append(f"{what}: {enumerate_names([one.class_name for one in named], _MOST_NAMED)}.")
    if copies := count_parts(split)["test"] - sum(scores.support for scores in tested):
        remarks.append(f"{plural(copies, 'test image')} not counted: the bytes are those of another.")
    if rejected := len(split["rejected"]):
        remarks.append(f"{plural(rejected, 'file')} rejected by split: see split.json.")
    return remarks + [f"Split: {note}." for note in split["notes"]]


@dataclass(frozen=True)
class NearDuplicates:
    """How many pairs have a cosine of `threshold` or more, and how many test images are in them.

    The accuracies are those on the test images that are in no pair, `None` if no image is left. `compared`: the share
    of all images that have enough contrast to be compared.
    """

    threshold: float
    pairs: int
    test_images: int
    head_accuracy: float | None
    finetuned_accuracy: float | None
    compared: float = 1.0


def count_near_duplicates(leaks: list[Leak], predictions: Predictions, compared: float) -> NearDuplicates:
    """Count the pairs, and score the models on the test images that are in none; `compared` is only kept."""
    paired = {leak.test for leak in leaks}
    left = np.array([path not in paired for path in predictions.paths])
    rights = [(predicted_labels(values) == predictions.labels)[left] for values in predictions.models.values()]
    head, finetuned = (float(right.mean()) if left.any() else None for right in rights)
    return NearDuplicates(THRESHOLD, len(leaks), len(paired), head, finetuned, compared)


def describe_near_duplicates(found: NearDuplicates, count: int) -> str:
    """Describe the result in one line; `count` is the number of test images."""
    if found.pairs:
        verb = "is" if found.test_images == 1 else "are"
        line = f"{found.test_images} of {count} test images {verb} nearly the same as a training or validation image"
        if found.head_accuracy is None or found.finetuned_accuracy is None:
            return f"{line}."
        accuracies = f"head {percent(found.head_accuracy)}, fine-tuned {percent(found.finetuned_accuracy)}"
        return f"{line}; without them: {accuracies}."
    flat = f"{percent(1 - found.compared)} of all images have too little contrast"
    if found.compared < 0.5:
        return f"Whether test images are nearly the same as others is not known: {flat} to be compared."
    limits = f"{LOOKED_FOR} {flat}." if found.compared < 1 else LOOKED_FOR
    return f"No test image was found to be nearly the same as a training or validation image. {limits}"


@dataclass(frozen=True)
class Evaluation:
    """The content of `scores.json`; `balanced` is `None` where the classes are not very unequal."""

    head: Scores
    finetuned: Scores
    gain: Gain
    near_duplicates: NearDuplicates
    balanced: BalancedGain | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, Scores]:
        """The scores by checkpoint, in the order of training; only the last one's if both are the same network."""
        both = {"head": self.head, "finetuned": self.finetuned}
        return {"finetuned": self.finetuned} if self.gain.identical else both


def evaluate(
    predictions: Predictions,
    groups: Groups | None,
    classes: list[ClassScores],
    split: dict[str, Any],
    leaks: list[Leak],
    identical: bool,
) -> Evaluation:
    """Return the result of the test; `split` is `split.json`, `identical` as for `Gain`."""
    labels, head, finetuned = predictions.labels, predictions.head, predictions.finetuned
    watched, balanced = not count_parts(split)["val"], compare_balanced(predictions, groups)
    return Evaluation(
        score(labels, head, groups),
        score(labels, finetuned, groups),
        compare(labels, head, finetuned, groups, identical=identical, watched=watched),
        count_near_duplicates(leaks, predictions, 1 - split.get("flat", 0.0)),
        balanced,
        find_remarks(classes, balanced, split),
    )


# Fields of `evaluation.json`, which `dvc metrics diff` and `dvc exp show` compare: no more than fits a screen.
_COMPARED = {
    "head": ("accuracy", "loss"),
    "finetuned": ("accuracy", "loss", "balanced_accuracy"),
    "gain": ("accuracy", "accuracy_low", "accuracy_high", "loss", "loss_low", "loss_high"),
}


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write `scores.json` and, of it, `evaluation.json` for DVC; a number that is undefined is null."""
    write_record(folder / "scores.json", evaluation)
    values = asdict(evaluation)
    compared = {part: {name: values[part][name] for name in names} for part, names in _COMPARED.items()}
    write_json(folder / "evaluation.json", compared)


def read_evaluation(folder: Path) -> Evaluation:
    """Read `scores.json`, as `write_evaluation` wrote it; raises what `read_record` does."""
    return read_record(folder / "scores.json", Evaluation, "evaluate")


def describe(evaluation: Evaluation) -> str:
    """Return the scores and the gain as aligned text, then the verdict and remarks."""
    rows, gain = [("", "", "95% interval", "loss")], evaluation.gain
    names = {"head": "head", "finetuned": "both" if gain.identical else "fine-tuned"}
    for model, scores in evaluation.scores.items():
        interval = percent_range(scores.accuracy_low, scores.accuracy_high)
        rows.append((names[model], f"Test accuracy: {percent(scores.accuracy)}", interval, number(scores.loss)))
    if not gain.identical:
        interval = points_range(gain.accuracy_low, gain.accuracy_high)
        rows.append(("gain", points(gain.accuracy), interval, signed(gain.loss)))
    return "\n".join([*align(rows), describe_gain(gain), *evaluation.remarks])


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines; the first column is left-aligned, others right-aligned."""
    columns = [[cell.rjust(max(map(len, cells))) for cell in cells] for cells in zip(*rows, strict=True)]
    columns[0] = [cell.ljust(len(columns[0][0])) for cell, *_ in rows]
    return ["  ".join(line) for line in zip(*columns, strict=True)]


def main() -> None:
    """Print the table and the verdict of an evaluation."""
    parser = argparse.ArgumentParser(prog="python -m stages.scores.evaluation", description=main.__doc__)
    parser.add_argument("metrics", type=Path, help="folder, as `evaluate` writes it")
    print(describe(read_evaluation(parser.parse_args().metrics)))


if __name__ == "__main__":
    run(main)
