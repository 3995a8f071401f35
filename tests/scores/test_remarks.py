"""What a reader has to know beside the scores."""

import numpy as np
import pytest

from stages.scores.evaluation import compare_balanced, find_remarks, score_classes
from stages.scores.predictions import Predictions

NOTHING = {"rejected": [], "notes": []}


def predictions(counts: dict[str, int], head: dict[str, int], finetuned: dict[str, int]) -> Predictions:
    """`head` and `finetuned`: how many images of each class are classified correctly; the others as the first."""
    labels = np.repeat(np.arange(len(counts)), list(counts.values()))

    def probabilities(correct: dict[str, int]) -> np.ndarray:
        chosen = [
            label if number < correct[name] else 0
            for label, (name, count) in enumerate(counts.items())
            for number in range(count)
        ]
        return np.eye(len(counts))[chosen] * 0.9 + 0.1 / len(counts)

    paths = [str(number) for number in range(len(labels))]
    return Predictions(paths, labels, list(counts), probabilities(head), probabilities(finetuned))


def remarks(run: Predictions, split: dict[str, list[object]] = NOTHING, copies: int = 0) -> list[str]:
    counts = {"train": 1, "val": 1, "test": len(run.labels) + copies}
    return find_remarks(score_classes(run), compare_balanced(run), split | {"classes": {"all": counts}})


def test_unequal_classes_are_judged_by_balanced_accuracy() -> None:
    counts = {"good": 440, "flaw": 40}
    run = predictions(counts, {"good": 440, "flaw": 20}, {"good": 440, "flaw": 30})
    found = compare_balanced(run)
    assert found is not None
    assert (found.head, found.finetuned, found.gain) == pytest.approx((0.75, 0.875, 0.125))
    # 10 of 40 fixed: half of the interval of a share of 0.25, by the normal approximation.
    half = 1.96 * np.sqrt(0.25 * 0.75 / 40) / 2
    assert (found.gain_low, found.gain_high) == pytest.approx((0.125 - half, 0.125 + half), abs=0.01)
    # Of groups, each is one observation.
    grouped = compare_balanced(run, np.arange(480) // 10)
    assert grouped is not None
    assert grouped.gain_low == pytest.approx(0)
    (line,) = remarks(run)
    assert line.startswith(
        "The classes are unequal, 440 test images to 40: look at the balanced accuracy, 75.00% before"
    )
    assert compare_balanced(predictions({"good": 400, "flaw": 40}, counts, counts)) is None
    (line,) = remarks(predictions(counts, counts, counts))
    assert line.endswith("look at the balanced accuracy, 100.00%.")


def test_rare_untested_and_never_predicted_classes_are_named() -> None:
    counts = {"cat": 40, "dog": 30, "owl": 19, "fox": 0}
    lines = remarks(predictions(counts, counts, {"cat": 40, "dog": 0, "owl": 5, "fox": 0}))
    assert lines == [
        "Never predicted by the fine-tuned network: dog.",
        "Fewer than 20 test images, which say little of a class: owl.",
        "Without test images: fox.",
    ]
    many = {f"class {number}": 5 for number in range(30)}
    (few,) = remarks(predictions(many, many, many))
    assert few.endswith(": class 0, class 1, class 2 ... (30 in all).")


def test_left_out_images_are_reported_beside_the_scores() -> None:
    counts = {"cat": 50, "dog": 60}
    assert remarks(predictions(counts, counts, counts)) == []
    split: dict[str, list[object]] = {"rejected": [{}, {}], "notes": ["5 images beside the class folders left out"]}
    assert remarks(predictions(counts, counts, counts), split, 3) == [
        "3 test images not counted: the bytes are those of another.",
        "2 files rejected by split: see split.json.",
        "Split: 5 images beside the class folders left out.",
    ]


def test_a_class_of_which_each_image_is_fixed_or_broken_has_an_interval() -> None:
    # 1 - 4/5 - 1/5 is below 0 in floats.
    labels = np.repeat([0, 1], [60, 5])
    before, after = labels.copy(), labels.copy()
    before[60:64], after[64] = 0, 0
    values = [np.eye(2)[guesses] * 0.8 + 0.1 for guesses in (before, after)]
    found = compare_balanced(Predictions([""] * 65, labels, ["good", "flaw"], *values))
    assert found is not None
    assert found.gain == pytest.approx(0.3)
    assert found.gain_low < 0.3 < found.gain_high <= 0.5
