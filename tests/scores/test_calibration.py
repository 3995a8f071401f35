"""Temperatures, and what they and leaving images to a person are worth, against planted answers."""

import numpy as np
import pytest
import torch

from stages.network import objective
from stages.network.objective import fit_temperature
from stages.scores.calibration import (
    choose_threshold,
    describe_coverage,
    measure_calibration,
    measure_calibrations,
    measure_coverage,
    risk_curve,
    without_temperature,
)
from stages.scores.metrics import predicted_labels, score
from stages.scores.predictions import Predictions


def honest(images: int, outputs: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose probabilities are right as often as they say."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(images, outputs, generator=generator, dtype=torch.float64)
    probabilities = objective.probabilities(logits)
    return logits, torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@pytest.mark.parametrize(("outputs", "planted"), [(1, 0.5), (4, 3.0)])
def test_a_planted_temperature_is_recovered(outputs: int, planted: float) -> None:
    logits, labels = honest(20_000, outputs, spread=2)
    assert fit_temperature(planted * logits, labels) == pytest.approx(planted, rel=0.05)


@pytest.mark.parametrize("images", [1, 10, 100])
def test_a_few_images_without_a_mistake_do_not_give_infinite_confidence(images: int) -> None:
    temperature = fit_temperature(torch.full((images, 1), 3.0), torch.ones(images, dtype=torch.int64))
    assert 0.3 < temperature < 1


@pytest.mark.parametrize("classes", [2, 5])
def test_a_temperature_changes_no_prediction_and_can_be_undone(classes: int) -> None:
    logits, _ = honest(500, objective.outputs_for(classes), spread=6)
    plain, divided = (objective.probabilities(logits, temperature).numpy() for temperature in (1.0, 2.5))
    assert np.array_equal(predicted_labels(plain), predicted_labels(divided))
    assert np.abs(without_temperature(divided, 2.5) - plain).max() < 1e-12


@pytest.mark.parametrize("classes", [2, 3])
def test_calibration_before_and_after_equals_the_scores_and_lies_in_its_intervals(classes: int) -> None:
    logits, labels = (values.numpy() for values in honest(400, objective.outputs_for(classes), spread=2))
    plain, divided = (objective.probabilities(torch.tensor(3 * logits), t).numpy() for t in (1.0, 3.0))
    measured = measure_calibration(labels, divided, 3.0, "")
    before, after = score(labels, plain), score(labels, divided)
    measured_sides = (measured.before, measured.after, measured.change)
    assert [side.ece for side in measured_sides] == pytest.approx(
        [before.ece, after.ece, after.ece - before.ece], abs=1e-9
    )
    for name in ("loss", "brier"):
        sides = [getattr(side, name) for side in measured_sides]
        expected = [getattr(before, name), getattr(after, name), getattr(after, name) - getattr(before, name)]
        assert [side.value for side in sides] == pytest.approx(expected, abs=1e-9)
        assert sides[0].low < sides[0].value < sides[0].high
    # The planted temperature is right: the bootstrap knows that it lowers the loss.
    assert measured.change.loss.high < 0


def coverage_of(confidences: list[float], wrong: set[int]) -> tuple[np.ndarray, np.ndarray]:
    sure = np.array(confidences)
    labels = np.array([1 if position in wrong else 0 for position in range(len(sure))])
    return labels, np.stack([sure, 1 - sure], axis=1)


def test_as_few_images_as_possible_are_left_to_a_person() -> None:
    # The 150th and the 190th surest are wrong: of 199 one may be, of 200 both.
    labels, probabilities = coverage_of(np.linspace(0.999, 0.6, 300).tolist(), {149, 189, 230, 231})
    assert choose_threshold(labels, probabilities) == probabilities[229, 0]
    found = measure_coverage(labels, probabilities, float(probabilities[229, 0]), 300)
    assert (found.answered, found.mistakes) == (230, 2)
    assert found.left == pytest.approx(70 / 300)
    assert found.left_low < found.left < found.left_high
    assert "leaves 23.3% of the test images to a person" in describe_coverage(found)
    assert "2 mistakes on the other 230 (95% interval 0.24% to 3.11%)" in describe_coverage(found)


def test_images_with_equal_probability_are_answered_together_or_not_at_all() -> None:
    assert choose_threshold(*coverage_of([0.9] * 50 + [0.8] * 50, {99})) == 0.8
    labels, probabilities = coverage_of([0.9] * 50 + [0.8] * 50, {60, 70})
    assert choose_threshold(labels, probabilities) == 0.9
    assert [values.tolist() for values in risk_curve(labels, probabilities)] == [[0.9, 0.8], [0.5, 1], [0, 0.02]]


def test_the_threshold_comes_from_the_validation_images() -> None:
    labels, probabilities = coverage_of([0.9] * 50 + [0.8] * 50, set())
    predictions = Predictions([""] * 100, labels, ["cat", "dog"], probabilities, probabilities)
    validation = coverage_of([0.95] * 20 + [0.85] * 20, {30})
    coverage = measure_calibrations(predictions, (1.0, 1.0), ("a", "b"), validation).coverage
    assert (coverage.threshold, coverage.validation, coverage.answered) == (0.95, 40, 0)
    nothing = measure_calibrations(predictions, (1.0, 1.0), ("a", "b"), (labels[:0], probabilities[:0])).coverage
    assert (nothing.threshold, nothing.validation) == (None, 0)


def test_without_a_threshold_the_report_says_so_and_gives_no_command() -> None:
    test = coverage_of([0.9] * 10, {3})
    assert choose_threshold(*test) is None
    for validation, expected in ((10, "even the most confident are wrong"), (0, "No validation images")):
        said = describe_coverage(measure_coverage(*test, None, validation))
        assert expected in said
        assert "--reject" not in said


def test_the_interval_of_the_loss_contains_the_true_loss_as_often_as_promised() -> None:
    logits, labels = honest(200_000, 1, spread=2)
    truth, held = objective.loss(logits, labels).item(), 0
    probabilities = objective.probabilities(logits).numpy()
    for part in np.split(np.arange(60 * 150), 60):
        loss = measure_calibration(labels[part].numpy(), probabilities[part], 1.0, "").after.loss
        held += loss.low <= truth <= loss.high
    assert held >= 50


def test_the_promised_error_rate_holds_for_a_calibrated_network() -> None:
    held = 0
    for seed in range(100):
        logits, labels = honest(4_000, 1, spread=5, seed=seed)
        probabilities, truth = objective.probabilities(logits).numpy(), labels.numpy()
        threshold = choose_threshold(truth[:200], probabilities[:200])
        found = measure_coverage(truth[200:560], probabilities[200:560], threshold, 200)
        others, sure = probabilities[560:], probabilities[560:].max(axis=1) >= (threshold or 1)
        rate = (predicted_labels(others) != truth[560:])[sure].mean() if sure.any() else 0
        held += found.wrong_low <= rate <= found.wrong_high
    assert held >= 88
