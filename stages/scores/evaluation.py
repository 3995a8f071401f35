"""The result of the test: both checkpoints' scores, the gain, and whether the test is clean.

`python -m stages.scores.evaluation metrics` prints it again.
"""

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.cli import run
from stages.common.files import write_json
from stages.common.format import number, percent, percent_range, points, points_range, signed
from stages.common.records import read_record, write_record
from stages.images.index import Groups
from stages.images.near_duplicates import LOOKED_FOR, THRESHOLD, Leak
from stages.scores.classes import BalancedGain, ClassScores, compare_balanced, find_remarks
from stages.scores.metrics import Scores, predicted_labels, score
from stages.scores.predictions import Predictions
from stages.scores.verdict import Gain, compare, describe_gain


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
    head, finetuned = (
        float((predicted_labels(probabilities) == predictions.labels)[left].mean()) if left.any() else None
        for probabilities in (predictions.head, predictions.finetuned)
    )
    return NearDuplicates(THRESHOLD, len(leaks), len(paired), head, finetuned, compared)


def describe_none(found: NearDuplicates) -> str:
    """Say that there is no pair, as far as was looked."""
    flat = f"{percent(1 - found.compared)} of all images have too little contrast"
    if found.compared < 0.5:
        return f"Whether test images are nearly the same as others is not known: {flat} to be compared."
    limits = f"{LOOKED_FOR} {flat}." if found.compared < 1 else LOOKED_FOR
    return f"No test image was found to be nearly the same as a training or validation image. {limits}"


def describe_near_duplicates(found: NearDuplicates, count: int) -> str:
    """Put the result into one line; `count` is the number of all test images."""
    if not found.pairs:
        return describe_none(found)
    verb = "is" if found.test_images == 1 else "are"
    line = f"{found.test_images} of {count} test images {verb} nearly the same as a training or validation image"
    if found.head_accuracy is None or found.finetuned_accuracy is None:
        return f"{line}."
    accuracies = f"head {percent(found.head_accuracy)}, fine-tuned {percent(found.finetuned_accuracy)}"
    return f"{line}; without them: {accuracies}."


@dataclass(frozen=True)
class Evaluation:
    """The content of `scores.json`.

    `balanced` is `None` where the classes are not very unequal; `remarks` are sentences.
    """

    head: Scores
    finetuned: Scores
    gain: Gain
    near_duplicates: NearDuplicates
    balanced: BalancedGain | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, Scores]:
        """The scores by checkpoint, in the order of training; the last one's alone where both are the same network."""
        both = {"head": self.head, "finetuned": self.finetuned}
        return {"finetuned": self.finetuned} if self.gain.identical else both


def evaluate(
    predictions: Predictions,
    groups: Groups | None,
    classes: list[ClassScores],
    split: dict[str, Any],
    leaks: list[Leak],
    *,
    copies: int,
    identical: bool,
    watched: bool,
) -> Evaluation:
    """Return the result of the test; `split` is `split.json`, the last three as for `find_remarks` and `compare`."""
    labels, balanced = predictions.labels, compare_balanced(predictions, groups)
    return Evaluation(
        score(labels, predictions.head, groups),
        score(labels, predictions.finetuned, groups),
        compare(labels, predictions.head, predictions.finetuned, groups, identical=identical, watched=watched),
        count_near_duplicates(leaks, predictions, 1 - split.get("flat", 0.0)),
        balanced,
        find_remarks(classes, balanced, split, copies),
    )


# Of `evaluation.json`, which `dvc metrics diff` and `dvc exp show` compare: a screen of it.
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
    """Return the scores and the gain as lines of aligned text, the verdict below them, and what else to know."""
    rows, gain = [("", "", "95% interval", "loss")], evaluation.gain
    names = {"head": "head", "finetuned": "both" if gain.identical else "fine-tuned"}
    for model, scores in evaluation.scores.items():
        interval = percent_range(scores.accuracy_low, scores.accuracy_high)
        rows.append((names[model], f"Test accuracy: {percent(scores.accuracy)}", interval, number(scores.loss)))
    if not gain.identical:
        interval = points_range(gain.accuracy_low, gain.accuracy_high)
        rows.append(("gain", points(gain.accuracy), interval, signed(gain.loss)))
    name_width, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        "  ".join([name.ljust(name_width), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for name, *cells in rows
    ]
    return "\n".join([*lines, describe_gain(gain), *evaluation.remarks])


def main() -> None:
    """Print the table and the verdict of an evaluation."""
    parser = argparse.ArgumentParser(prog="python -m stages.scores.evaluation", description=main.__doc__)
    parser.add_argument("metrics", type=Path, help="folder, as `evaluate` writes it")
    print(describe(read_evaluation(parser.parse_args().metrics)))


if __name__ == "__main__":
    run(main)
