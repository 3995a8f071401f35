"""What the figures and the report say of probabilities, on made-up ones."""

import numpy as np
import pytest
from matplotlib.text import Text

from stages.report.markdown import describe_probabilities
from stages.report.probability_figures import draw_coverage, draw_reliability
from stages.scores.calibration import Calibrations, measure_calibrations
from stages.scores.metrics import score
from stages.scores.predictions import Predictions


def predictions_of(confidences: list[float], right: list[bool]) -> Predictions:
    sure = np.array(confidences)
    probabilities = np.stack([sure, 1 - sure], axis=1)
    labels = np.array([0 if is_right else 1 for is_right in right])
    return Predictions([""] * len(sure), labels, ["cat", "dog"], probabilities, probabilities)


SURE = predictions_of([0.99] * 90 + [0.8] * 10, [True] * 95 + [False] * 5)


def measured(*temperatures: float) -> Calibrations:
    return measure_calibrations(SURE, temperatures, ("a", "b"), (SURE.labels, SURE.finetuned))


def test_the_table_has_the_scores_without_and_with_the_temperature() -> None:
    text = describe_probabilities(measured(1.0, 1.5), 40, 0)
    assert "1.000 (head phase) and 1.500 (fine-tuned); fitted to 40 validation images" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| fine-tuned, log-loss"))
    after = score(SURE.labels, SURE.finetuned).loss
    assert f" {after:.4f} (" in row.split("|")[3]
    assert f" {after:.4f} (" not in row.split("|")[2]
    assert "a probability of 0.990 or more are wrong on the 100 validation images" in text
    assert "0 mistakes on the other 90" in text
    assert "--reject 0.990" in text


def test_one_network_is_described_once() -> None:
    text = describe_probabilities(measured(1.5, 1.5), 40, 0, identical=True)
    assert "1.500 (both checkpoints); fitted to" in text
    assert text.count("log-loss |") == 1


def test_it_says_on_which_images_each_temperature_was_fitted() -> None:
    calibrations = measured(1.0, 1.5)
    text = describe_probabilities(calibrations, 40, 320)
    assert (
        "the head's is fitted to 320 out-of-fold predictions, the fine-tuned network's changes it as 40 validation"
        in text
    )
    assert "the fine-tuned network's is the same" in describe_probabilities(calibrations, 0, 320)


def test_without_validation_images_the_report_says_that_no_temperature_was_fitted() -> None:
    text = describe_probabilities(measured(1.0, 1.0), 0, 0)
    assert "a temperature is fitted on validation images, and there are none" in text
    assert "|" not in text


@pytest.mark.parametrize(("temperature", "columns"), [(1.0, 1), (2.0, 2)])
def test_reliability_is_drawn_without_and_with_the_temperature(temperature: float, columns: int) -> None:
    figure = draw_reliability(SURE, measured(1.0, temperature))
    assert len(figure.axes) == 2 * columns
    texts = [text.get_text() for text in figure.findobj(Text)]
    # 90 that are right and 1% unsure, 10 of which half is right at 80%.
    assert f"fine-tuned, calibration error {(90 * 0.01 + 10 * 0.3) / 100:.2%}" in texts
    assert len({text for text in texts if text.startswith("fine-tuned, calibration error")}) == columns


def test_the_ring_is_where_the_rest_is_left_to_a_person() -> None:
    (axes,) = draw_coverage(SURE, measured(1.0, 1.0)).axes
    (ring,) = (line for line in axes.lines if line.get_fillstyle() == "none")
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([pytest.approx(0.9)], [0])
    assert ring.get_label() == "10.0% left to a person, by validation"
