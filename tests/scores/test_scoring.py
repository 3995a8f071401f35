"""Scores, their intervals and the verdict, against scikit-learn, published examples and formulas worked by hand."""

import itertools
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from by_hand import mcnemar, newcombe, wilson
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    log_loss,
    roc_auc_score,
)

from stages.images.index import Entry, number_groups
from stages.scores import evaluation, metrics, verdict
from stages.scores.evaluation import ClassScores, NearDuplicates, score_classes
from stages.scores.predictions import (
    Predictions,
    image_losses,
    read_predictions,
    write_predictions,
    write_probabilities,
)

NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make_model(labels: np.ndarray, classes: int, strength: float, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(len(labels), classes)) + strength * np.eye(classes)[labels]
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def certain(labels: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[labels]


def model_with(right: list[bool], labels: np.ndarray) -> np.ndarray:
    """Probabilities of two classes that are right where they are to be."""
    return np.where(np.array(right)[:, None] == np.eye(2, dtype=bool)[labels], 0.8, 0.2)


def scores_of_classes(labels: np.ndarray, head: np.ndarray) -> list[ClassScores]:
    """Of a head that predicts so, and of a fine-tuned checkpoint that is sure of the first class."""
    classes = head.shape[1]
    finetuned = certain([0] * len(labels), classes)
    return score_classes(Predictions([""] * len(labels), labels, NAMES[:classes], head, finetuned))


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_equal_scikit_learns(classes: int) -> None:
    labels = np.random.default_rng(0).integers(0, classes, 300)
    values = make_model(labels, classes, 1.0, 1)
    scores = metrics.score(labels, values)
    predicted, numbers = values.argmax(axis=1), list(range(classes))
    positive = values[:, 1] if classes == 2 else values
    ap = average_precision_score(np.eye(classes)[labels], values, average=None)
    expected = {
        "accuracy": (predicted == labels).mean(),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "loss": log_loss(labels, values),
        "auroc": roc_auc_score(labels, positive, multi_class="ovr", average="macro"),
        "average_precision": ap[1] if classes == 2 else ap.mean(),
        "f1_macro": f1_score(labels, predicted, average="macro"),
        "brier": brier_score_loss(labels, positive, labels=numbers),
    }
    for name, value in expected.items():
        assert getattr(scores, name) == pytest.approx(value, abs=1e-12), name
    assert image_losses(labels, values).mean() == pytest.approx(scores.loss, abs=1e-12)
    for label, of_class in enumerate(scores_of_classes(labels, values)):
        hits = int(((predicted == label) & (labels == label)).sum())
        assert (of_class.label, of_class.class_name, of_class.support) == (label, NAMES[label], (labels == label).sum())
        assert of_class.head_precision == pytest.approx(hits / (predicted == label).sum())
        assert of_class.head_recall == pytest.approx(hits / (labels == label).sum())
        assert of_class.finetuned_precision == (None if label else pytest.approx((labels == 0).mean()))
        assert of_class.finetuned_recall == (0 if label else 1)


def test_calibration_error_equals_the_one_counted_by_hand() -> None:
    # Bins of 1/15: 0.60 is the upper edge of one, 0.61 and 0.65 are in the next, 0.99 in the last.
    confidences = np.array([0.60, 0.61, 0.65, 0.99, 0.99])
    right = np.array([True, False, True, True, True])
    expected = (abs(1 - 0.60) + abs(1 - (0.61 + 0.65)) + abs(2 - 2 * 0.99)) / 5
    assert metrics.expected_calibration_error(right, confidences) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_an_accuracy_equals_the_published_one(
    successes: int, count: int, low: float, high: float
) -> None:
    assert metrics.wilson_interval(successes, count) == pytest.approx((low, high), abs=5e-5)
    assert metrics.wilson_interval(successes, count) == pytest.approx(wilson(successes, count), abs=1e-12)


def test_the_paired_interval_equals_the_published_one() -> None:
    # Fagerland, Lydersen & Laake 2014, Statistics in Medicine 33:2850-2875: airway hyper-responsiveness, 21 children.
    interval = verdict.paired_interval(both=1, fixed=7, broken=1, count=21)
    assert interval == pytest.approx((0.026, 0.507), abs=5e-4)


@pytest.mark.parametrize(
    ("both", "fixed", "broken", "count"), [(380, 8, 3, 400), (0, 3, 2, 5), (0, 4, 1, 5), (0, 1, 0, 1), (400, 0, 0, 400)]
)
def test_the_paired_interval_contains_the_difference_and_is_antisymmetric(
    both: int, fixed: int, broken: int, count: int
) -> None:
    low, high = verdict.paired_interval(both, fixed, broken, count)
    assert -1 <= low <= (fixed - broken) / count <= high <= 1
    assert low < high
    assert (low, high) == pytest.approx(newcombe(both, broken, fixed, count - both - broken - fixed), abs=1e-12)
    assert verdict.paired_interval(both, broken, fixed, count) == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    ("fixed", "broken", "expected"), [(5, 0, "no evidence"), (6, 0, "better"), (0, 6, "worse"), (13, 3, "better")]
)
def test_the_verdict_follows_mcnemars_exact_test(fixed: int, broken: int, expected: str) -> None:
    labels = np.arange(40) % 2
    right = [True] * broken + [False] * fixed + [True] * (40 - fixed - broken)
    after = [False] * broken + [True] * fixed + [True] * (40 - fixed - broken)
    gain = verdict.compare(labels, model_with(right, labels), model_with(after, labels))
    assert gain.mcnemar_p == pytest.approx(mcnemar(fixed, broken), abs=1e-12)
    assert (gain.fixed, gain.broken, gain.verdict) == (fixed, broken, expected)
    assert gain.accuracy == pytest.approx((fixed - broken) / 40)


def test_the_same_model_twice_is_no_evidence() -> None:
    labels = np.arange(50) % 4
    values = make_model(labels, 4, 1.0, 3)
    gain = verdict.compare(labels, values, values)
    assert (gain.accuracy, gain.loss, gain.fixed, gain.broken, gain.mcnemar_p) == (0, 0, 0, 0, 1)
    assert gain.verdict == gain.loss_verdict == "no evidence"
    assert gain.accuracy_low < 0 < gain.accuracy_high
    # Of the same network it is exactly 0, whatever the images.
    gain = verdict.compare(labels, values, values, identical=True)
    assert gain.identical
    assert (gain.accuracy_low, gain.accuracy_high, gain.loss_low, gain.loss_high) == (0, 0, 0, 0)


def of_losses(losses: np.ndarray) -> np.ndarray:
    """Probabilities of two classes, for images of the first, that have these log-losses."""
    return np.stack([np.exp(-losses), 1 - np.exp(-losses)], axis=1)


def test_the_interval_of_the_log_loss_is_that_of_paired_differences() -> None:
    chance = np.random.default_rng(0)
    before = chance.exponential(0.3, 400)
    differences = chance.normal(-0.01, 0.05, 400).clip(-before)
    gain = verdict.compare(np.zeros(400, dtype=np.int64), of_losses(before), of_losses(before + differences))
    assert gain.loss == pytest.approx(differences.mean())
    half = 1.96 * differences.std() / math.sqrt(400)
    expected = (gain.loss - half, gain.loss + half)
    # Of the normal approximation; unpaired it would be six times as wide.
    assert (gain.loss_low, gain.loss_high) == pytest.approx(expected, abs=0.1 * half)


def test_probabilities_can_be_better_where_accuracy_is_no_evidence() -> None:
    before = np.full(60, 0.4)
    after = before - np.random.default_rng(0).uniform(0.1, 0.3, 60)
    labels = np.zeros(60, dtype=np.int64)
    better = verdict.compare(labels, of_losses(before), of_losses(after))
    assert (better.verdict, better.loss_verdict) == ("no evidence", "better")
    worse = verdict.compare(labels, of_losses(after), of_losses(before))
    assert (worse.verdict, worse.loss_verdict) == ("no evidence", "worse")
    assert (worse.loss_low, worse.loss_high) == pytest.approx((-better.loss_high, -better.loss_low), rel=0.05)
    # All five alike is what one in 16 coin tosses gives, too.
    few = verdict.compare(labels[:5], of_losses(before[:5]), of_losses(after[:5]))
    assert (few.loss_low, few.loss_high, few.loss_verdict) == (None, None, "no evidence")


def test_without_a_difference_the_interval_of_the_log_loss_contains_0_in_95_percent_of_cases() -> None:
    chance, labels = np.random.default_rng(0), np.zeros(8, dtype=np.int64)
    gains = [verdict.compare(labels, *(of_losses(chance.exponential(0.5, 8)) for _ in range(2))) for _ in range(300)]
    # Less three standard deviations.
    assert np.mean([gain.loss_verdict == "no evidence" for gain in gains]) > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 300)


def test_images_of_a_group_are_one_observation() -> None:
    chance, labels = np.random.default_rng(1), np.arange(40) % 2
    right = [*[False] * 5, *[True] * 35]
    head, finetuned = (model_with(values, labels) for values in (right, [True] * 40))
    finetuned = finetuned + (0.5 - finetuned) * chance.random((40, 1)) * 0.5
    one = verdict.compare(labels, head, finetuned)
    assert (one.fixed, one.broken, one.verdict) == (5, 0, "no evidence")
    # Each image ten times says no more than each once.
    again = [np.repeat(values, 10, axis=0) for values in (labels, head, finetuned)]
    assert verdict.compare(*again).verdict == "better"
    grouped = verdict.compare(*again, np.repeat(np.arange(40), 10))
    assert (grouped.fixed, grouped.groups, grouped.verdict) == (50, 40, "no evidence")
    assert grouped.mcnemar_p == pytest.approx(one.mcnemar_p)
    assert (grouped.loss_low, grouped.loss_high) == pytest.approx((one.loss_low, one.loss_high))
    alone = verdict.compare(*again)
    assert grouped.accuracy_high - grouped.accuracy_low > 2 * (alone.accuracy_high - alone.accuracy_low)
    scores, plain = (metrics.score(again[0], again[1], groups) for groups in (np.repeat(np.arange(40), 10), None))
    assert scores.accuracy_low < plain.accuracy_low < plain.accuracy_high < scores.accuracy_high
    # Of few groups nothing can be told.
    few = verdict.compare(*again, np.repeat(np.arange(4), 100))
    assert (few.accuracy_low, few.accuracy_high, few.loss_low, few.loss_verdict) == (-1, 1, None, "no evidence")


def test_the_p_value_of_groups_equals_that_of_all_sign_flips() -> None:
    changes = np.array([3, -1, 2, 0, 2, 4, 1])
    sums = [abs(np.dot(signs, np.abs(changes))) for signs in itertools.product([1, -1], repeat=len(changes))]
    assert verdict.mcnemar_p(changes) == pytest.approx(np.mean(np.array(sums) >= abs(changes.sum())))


def test_images_in_no_group_are_groups_of_their_own() -> None:
    names = ["a", "", "b", "a", "", "b/2.png"]
    entries = [Entry(f"{name}/{number}.png", 0, "cat", "", name) for number, name in enumerate(names)]
    assert list(number_groups(entries)) == [0, 1, 2, 0, 3, 4]
    assert number_groups([entries[1], entries[4]]) is None


def test_resamples_are_drawn_in_bounded_memory() -> None:
    for images in (3, 100_000, 3_000_000):
        counts = next(metrics.draw_counts(images, np.random.default_rng(0)))
        assert counts.size <= max(2_000_000, images)
        assert set(counts.sum(axis=1)) == {images}


def test_the_loss_of_a_confident_prediction_keeps_its_digits() -> None:
    losses = image_losses(np.array([0, 1, 1]), np.array([[1.0, 1e-20], [1.0, 0.0], [0.0, 1.0]]))
    assert losses == pytest.approx([1e-20, -np.log(np.finfo(float).eps), 0], rel=1e-9)


def test_what_is_undefined_is_null_and_never_zero_or_nan() -> None:
    # bee is not in the test set, cat is never predicted, dog is neither; the means go over what is defined.
    labels = np.array([0, 0, 2])
    values = certain([0, 1, 0], 4) * 0.7 + 0.075
    scores = metrics.score(labels, values)
    assert json.loads(json.dumps(asdict(scores), allow_nan=False)) == asdict(scores)
    classes = scores_of_classes(labels, values)
    assert [(scores.class_name, scores.head_precision, scores.head_recall, scores.support) for scores in classes] == [
        ("ant", 0.5, 0.5, 2),
        ("bee", 0.0, None, 0),
        ("cat", None, 0.0, 1),
        ("dog", None, None, 0),
    ]
    assert scores.balanced_accuracy == pytest.approx((0.5 + 0) / 2)
    assert scores.f1_macro == pytest.approx((0.5 + 0 + 0) / 3)
    assert scores.auroc == pytest.approx(np.mean([roc_auc_score([1, 1, 0], [1, 0, 1]), 0.5]))
    scores = metrics.score(np.array([0, 0]), certain([0, 1], 2))
    assert (scores.auroc, scores.average_precision) == (None, None)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_single_image_can_be_scored(classes: int, right: bool) -> None:
    labels = np.array([1])
    values = certain([1 if right else 0], classes)
    scores = metrics.score(labels, values)
    assert scores.accuracy == scores.balanced_accuracy == float(right)
    assert 0 <= scores.accuracy_low < scores.accuracy_high <= 1
    assert scores.auroc is None
    assert scores_of_classes(labels, values)[0].head_recall is None
    gain = verdict.compare(labels, values, certain([1], classes))
    json.dumps([asdict(scores), asdict(gain)], allow_nan=False)
    assert gain.fixed == int(not right)
    assert gain.verdict == "no evidence"


GAIN = verdict.Gain(0.025, 0.009, 0.0476, -0.01, -0.02, 0.001, 13, 3, 0.0213, "better", "no evidence")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "Accuracy: better, +2.50 points (95% interval +0.90 to +4.76, p = 0.021; 13 images fixed, 3 broken); "
            "probabilities: no evidence, log-loss -0.0100 (-0.0200 to +0.0010).",
        ),
        (
            {"verdict": "worse", "accuracy": -0.00001, "fixed": 1, "mcnemar_p": 1e-7, "groups": 40, "loss_low": None},
            "Accuracy: worse, +0.00 points (95% interval +0.90 to +4.76, p < 0.001; 1 image fixed, 3 broken); "
            "probabilities: no evidence, log-loss -0.0100 (no interval of fewer than 6 groups); by 40 whole groups.",
        ),
        (
            {"verdict": None, "loss_verdict": None, "mcnemar_p": None},
            "NO VERDICT: training watched the test images (split.val_size is 0), which flatters: "
            "accuracy +2.50 points, log-loss -0.0100.",
        ),
        (
            {"identical": True, "verdict": None, "mcnemar_p": None},
            "Fine-tuning changed nothing: both checkpoints are the same network. Try another finetune.lr, more blocks "
            "(finetune.unfreeze) or more images.",
        ),
    ],
)  # fmt: skip
def test_the_verdict_is_one_plain_sentence(changes: dict[str, object], expected: str) -> None:
    assert verdict.describe_gain(replace(GAIN, **changes)) == expected


@pytest.mark.parametrize("classes", [20, 21])
def test_predictions_are_read_as_they_were_written_however_many_classes(classes: int, tmp_path: Path) -> None:
    labels = np.arange(50) % classes
    written = Predictions(
        [f"größe, {number}/\udcff{number}.png" for number in range(50)],
        labels,
        [f"a.b_{label}" for label in range(classes)],
        make_model(labels, classes, 1.0, 1),
        make_model(labels, classes, 2.0, 2),
    )
    table, archive = tmp_path / "predictions.csv", tmp_path / "predictions.npz"
    write_predictions(table, written)
    write_probabilities(archive, written)
    content = archive.read_bytes()
    write_probabilities(archive, written)
    assert archive.read_bytes() == content
    columns = table.read_text(errors="surrogateescape").splitlines()[0].split(",")
    assert len(columns) == (2 + 2 * classes if classes <= 20 else 8)
    read = read_predictions(archive)
    assert (read.paths, list(read.classes)) == (written.paths, written.classes)
    for name in ("labels", "head", "finetuned"):
        assert np.array_equal(getattr(read, name), getattr(written, name)), name


def test_the_table_is_aligned_with_the_verdict_below_and_identical_networks_have_one_line() -> None:
    labels = np.arange(20) % 2
    scores = metrics.score(labels, make_model(labels, 2, 1.0, 6))
    result = evaluation.Evaluation(scores, scores, GAIN, NearDuplicates(0.9, 0, 0, 0.5, None))
    *lines, last = evaluation.describe(result).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("  ")[0] for line in lines[1:]] == ["head", "fine-tuned", "gain"]
    assert f"Test accuracy: {result.head.accuracy:.2%}" in lines[1]
    assert "+2.50 points" in lines[3]
    assert "-0.0100" in lines[3]
    assert last == verdict.describe_gain(GAIN)
    same = replace(result, gain=replace(GAIN, identical=True))
    _, line, advice = evaluation.describe(same).splitlines()
    assert line.startswith(f"both  Test accuracy: {result.finetuned.accuracy:.2%}")
    assert advice == verdict.describe_gain(same.gain)
