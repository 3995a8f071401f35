"""The report and what it says in sentences, on made-up scores."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from made_up import SURE, measured

from stages.images.division import CONFLICT
from stages.images.near_duplicates import Leak
from stages.report.page import FIGURES, compose_report, describe_probabilities, describe_suspects
from stages.scores.evaluation import ClassScores, Evaluation, NearDuplicates
from stages.scores.metrics import Scores, score
from stages.scores.suspects import Suspect
from stages.scores.verdict import Gain, describe_gain

NAMES = ["cat", "dog|wolf", "a_b*c"]
RECIPE = {
    "seed": 42,
    "model": {"arch": "mobilenet_v3_large", "weights": "my|weights.pth", "image_size": None},
    "finetune": {"lr": 1e-5},
}


PAIRS = [Leak("cat/1.jpg", "cat/2.jpg", 0.99)]


def scores(accuracy: float, **more: float | None) -> Scores:
    values: dict[str, Any] = {
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.05,
        "accuracy_high": accuracy + 0.02,
        **dict.fromkeys(("balanced_accuracy", "loss", "auroc", "average_precision", "f1_macro", "brier", "ece"), 0.5),
    }
    return Scores(**{**values, **more})


def evaluation(**changes: Any) -> Evaluation:
    gain = Gain(0.03, 0.01, 0.06, -0.1, -0.2, -0.05, 12, 3, 0.035, "better", "better")
    near = NearDuplicates(0.9, 0, 0, 0.9, 0.93)
    remarks = ["3 images beside the class folders left out."]
    found = Evaluation(scores(0.9, auroc=None, loss=0.2345), scores(0.93), gain, near, None, remarks)
    return replace(found, **changes)


def split(val: int = 100) -> dict[str, Any]:
    counts = {"train": 1000, "val": val, "test": 100}
    rejected = [{"path": "cat/1.jpg", "reason": "empty file"}]
    return {
        "pictures": 3 * sum(counts.values()),
        "classes": dict.fromkeys(NAMES, counts),
        "rejected": rejected,
        "duplicates": [["a", "b"], ["c", "d"]],
        "ignored": {},
        "notes": ["3 images beside the class folders left out"],
    }


def report(
    found: Evaluation | None = None,
    pairs: list[Leak] | None = None,
    val: int = 100,
    classes: list[ClassScores] | None = None,
) -> str:
    classes = classes or [ClassScores(label, name, 100, None, 0.75, 0.5, 0.8) for label, name in enumerate(NAMES)]
    sentences = ("Suspects.", "Worth.", ["How it went."], "First.\nSecond.")
    return compose_report(
        found or evaluation(), classes, split(val), RECIPE, pairs or [], *sentences, {"wrong": "No mistakes."}
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def row(text: str, start: str) -> list[str]:
    return next(cells(line) for line in text.splitlines() if line.startswith(f"| {start}"))


def test_the_report_begins_with_the_verdict_and_says_what_was_trained() -> None:
    text = report()
    assert text.splitlines()[2] == f"**{describe_gain(evaluation().gain)}**"
    assert "`mobilenet_v3_large`" in text
    assert "trained on 3,000 images of 3 classes, watched on 300, tested on 300." in text
    assert row(text, "cat") == ["cat", "1,000", "100", "100"]
    assert row(text, "**all**") == ["**all**", "**3,000**", "**300**", "**300**"]
    assert "1 file rejected, 2 groups of copies" in text
    assert "- 3 images beside the class folders left out.\n" in text
    assert "## Labels that may be wrong\n\nSuspects.\n" in text
    assert row(text, "`finetune.lr`") == ["`finetune.lr`", "`1e-05`"]
    assert row(text, "`model.image_size`") == ["`model.image_size`", "`null`"]
    assert [name for name, *_ in FIGURES if name != "wrong"] == re.findall(r"!\[[^]]+\]\(figures/(\w+)\.png\)", text)
    assert "### The most confident mistakes\n\nNo mistakes." in text
    assert "- First.\n- Second.\n" in text


def test_the_table_has_both_checkpoints_and_the_gain_and_odd_names_do_not_break_it() -> None:
    text = report()
    assert row(text, "accuracy") == ["accuracy", "90.00%", "93.00%", "+3.00 points"]
    assert row(text, "95% interval")[1:] == ["85.00% to 92.00%", "88.00% to 95.00%", "+1.00 to +6.00 points"]
    assert row(text, "log-loss") == ["log-loss (lower is better)", "0.2345", "0.5000", "+0.2655"]
    assert row(text, "area under ROC") == ["area under ROC", "undefined", "0.5000", "undefined"]
    assert "fixed 12 images and broke 3 (exact McNemar test: p = 0.035)" in text
    assert "| 95% interval |  |  | -0.2000 to -0.0500 |" in text
    assert row(text, "dog") == ["dog\\|wolf", "1,000", "100", "100"]
    assert "| a\\_b\\*c | 1,000" in text
    assert row(text, "`model.weights`") == ["`model.weights`", "`my\\|weights.pth`"]
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert all(len({len(cells(line)) for line in block}) == 1 for block in blocks)


def test_one_network_has_one_column_and_no_gain() -> None:
    same = replace(evaluation().gain, identical=True)
    text = report(evaluation(gain=same, near_duplicates=NearDuplicates(0.9, 1, 1, 0.88, 0.91)), PAIRS)
    assert text.splitlines()[2].startswith("**Fine-tuning changed nothing")
    assert row(text, "on the test images") == ["on the test images", "both checkpoints"]
    assert row(text, "accuracy") == ["accuracy", "93.00%"]
    assert row(text, "95% interval") == ["95% interval", "88.00% to 95.00%"]
    assert row(text, "without them") == ["without them", "91.00%"]
    assert row(text.split("## Every class")[1], "cat") == ["cat", "100", "50.00%", "80.00%"]
    for word in (" gain", "McNemar", "head phase", "fine-tuned |"):
        assert word not in text, word


def test_limits_are_stated_and_copies_are_not_counted() -> None:
    text, watched = report(), replace(evaluation().gain, mcnemar_p=None, verdict=None, loss_verdict=None)
    assert "The test set has 300 images: one of them is 0.33 points of accuracy." in text
    assert "The data are consistent with a true gain of +1.00 to +6.00 points of accuracy." in text
    assert "flatter" not in text
    assert "same bytes as one of these" not in text
    classes = [ClassScores(label, name, 100 - 7 * (not label), *[0.5] * 4) for label, name in enumerate(NAMES)]
    text = report(evaluation(gain=watched), val=0, classes=classes)
    assert "training watched the test images, so these numbers flatter" in text
    assert "watched and tested on the same 293" in text
    assert "true gain" not in text
    assert "The test set has 293 images: one of them is 0.34 points of accuracy." in text
    assert "7 more files of the test part have the same bytes as one of these" in text
    assert "group" not in report().split("## Images")[0]
    text = report(evaluation(gain=replace(evaluation().gain, groups=40)))
    assert "; by 40 whole groups" in text.splitlines()[2]
    assert "The test images are of 40 groups (`split.group`, near-duplicates); those of a group are alike." in text


def test_every_class_is_listed_with_its_scores_or_of_many_the_worst() -> None:
    text = report().split("## Every class")[1]
    assert row(text, "cat") == ["cat", "100", "undefined", "50.00%", "75.00%", "80.00%"]
    assert "classes.csv" not in text
    many = [ClassScores(label, f"kind {label}", 10, 0.5, 0.9, 0.5, 1 - label / 300) for label in range(300)]
    many[7] = ClassScores(7, "kind 7", 0, None, None, None, None)
    text = report(classes=many).split("## Every class")[1]
    assert re.findall(r"\| (kind \d+) ", text) == [f"kind {label}" for label in range(299, 279, -1)]
    assert "279 more in `classes.csv`" in text


@pytest.mark.parametrize("count", [0, 21])
def test_at_most_twenty_near_duplicates_are_listed(count: int) -> None:
    pairs = [Leak(f"cat/{number}.jpg", f"cat/_{number}.jpg", 0.99) for number in range(count)]
    text = report(evaluation(near_duplicates=NearDuplicates(0.9, count, count, 0.88, None)), pairs)
    assert text.count("\n| cat/") == min(count, 20)
    assert ("1 more in `near_duplicates.csv`" in text) == (count > 20)
    told = f"{count} pairs" if count else "No test image was found to be nearly the same as a training or validation"
    assert told in text
    if count:
        assert row(text, "all test images") == ["all test images", "90.00%", "93.00%"]
        assert row(text, "without them") == ["without them", "88.00%", "undefined"]


def test_the_least_probable_labels_are_listed() -> None:
    suspects = [Suspect(f"cat/{number}|.jpg", "cat", 0.01, "dog", 0.99) for number in range(25)]
    # Of 40 cats, the network takes three for dogs.
    probabilities = np.array([[0.01, 0.99]] * 3 + [[0.99, 0.01]] * 37 + [[0.02, 0.98]] * 40)
    judged = [str(number) for number in range(80)], np.array([0] * 40 + [1] * 40), probabilities
    split = {"rejected": [], "classes": {"cat": {"train": 0, "val": 0, "test": 80}}}
    text = describe_suspects(suspects, judged, ["cat", "dog"], split)
    assert text.startswith("25 images where the network prefers another label; about 3 of 80 labels may be wrong")
    assert "`make folds` looks at all images" in text
    assert row(text, "cat/0") == ["cat/0\\|.jpg", "cat", "0.0100", "dog", "0.9900"]
    assert row(text, "... ")[0] == "... 5 more in `suspects.csv`"
    assert "disagrees with no label" in describe_suspects([], judged, ["cat", "dog"], split)


def test_labels_of_images_out_of_fold_and_contradictions_are_listed_too() -> None:
    probabilities = np.array([[0.4, 0.6]] * 10 + [[0.6, 0.4]] * 10 + [[0.3, 0.7]] * 10)
    judged = [str(number) for number in range(30)], np.array([0] * 10 + [1] * 20), probabilities
    rejected = [
        {"path": "cat/a.jpg", "reason": f"same bytes as dog/b.jpg, {CONFLICT}"},
        {"path": "cat/c.jpg", "reason": "cannot be read"},
    ]
    split = {"rejected": rejected, "classes": {"cat": {"train": 5, "val": 5, "test": 20}}}
    text = describe_suspects([Suspect("cat/1", "cat", 0.4, "dog", 0.6)], judged, ["cat", "dog"], split)
    assert text.startswith("These images have two labels each, and are left out:\n\n|")
    assert row(text, "cat/a")[1].startswith("same bytes as dog/b.jpg")
    assert "cannot be read" not in text
    assert "make folds" not in text
    assert "Classes that are hardly told apart" in text
    assert "cat and dog (" in text


def test_numbers_have_one_format_and_no_zero_has_a_minus() -> None:
    gain = Gain(-1e-6, -0.01, 0.01, -1e-6, -0.01, 0.01, 3, 3, 0.00183, "no evidence", "no evidence")
    text = report(evaluation(gain=gain, head=scores(0.93), finetuned=scores(0.93 - 1e-6, loss=0.5 - 1e-6)))
    assert text.count("p = 0.002") == 2
    assert not re.search(r"-0\.0+\b", text)
    assert row(text, "accuracy")[3] == "+0.00 points"


def test_calibration_is_listed_without_and_with_the_temperature() -> None:
    text = describe_probabilities(measured(1.0, 1.5), 40, 0, False)
    assert "1.000 (head phase) and 1.500 (fine-tuned); fitted to 40 validation images" in text
    after = f"{score(SURE.labels, SURE.finetuned).loss:.4f} ("
    _, before, with_temperature, _ = row(text, "fine-tuned, log-loss")
    assert (with_temperature.startswith(after), before.startswith(after)) == (True, False)
    assert "a probability of 0.990 or more are wrong on the 100 validation images" in text
    assert "0 mistakes on the other 90" in text
    assert "--reject 0.990" in text
    once = describe_probabilities(measured(1.5, 1.5), 40, 0, identical=True)
    assert "1.500 (both checkpoints); fitted to" in once
    assert once.count("log-loss |") == 1


@pytest.mark.parametrize(
    ("validation", "out_of_fold", "told"),
    [
        (40, 320, "fitted to 320 out-of-fold predictions, the fine-tuned network's changes it as 40 validation images"),
        (0, 320, "the fine-tuned network's is the same"),
        (0, 0, "a temperature is fitted on validation images, and there are none"),
    ],
)
def test_the_report_says_on_which_images_each_temperature_was_fitted(
    validation: int, out_of_fold: int, told: str
) -> None:
    text = describe_probabilities(measured(1.0, 1.5), validation, out_of_fold, False)
    assert (told in text, "|" in text) == (True, out_of_fold > 0)
