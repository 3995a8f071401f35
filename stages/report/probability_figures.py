"""The figures of what a probability is worth: how often it is right, and what it is good for."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from stages.common.format import percent, probability
from stages.report.style import GREY, LOOKS, count_on_log_axis, house_style, new_figure
from stages.scores.calibration import MOST_WRONG, Calibrations, risk_curve, without_temperature
from stages.scores.metrics import (
    CALIBRATION_BINS,
    confidence_bins,
    expected_calibration_error,
    predicted_labels,
    wilson_interval,
)
from stages.scores.predictions import Predictions

_Floats = NDArray[np.float64]

_EDGES = np.linspace(0, 1, CALIBRATION_BINS + 1)


@house_style()
def draw_reliability(predictions: Predictions, calibrations: Calibrations) -> Figure:
    """Draw accuracy over the top probability, in 15 bins of equal width, and how many images each bin has.

    Where a checkpoint's probabilities are right, its points lie on the diagonal (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). Bars are Wilson's 95% interval: a bin of three images says little. Once for the
    logits as they are and once for those divided by the temperatures; only the first where there are none.
    """
    temperatures = calibrations.temperatures
    plain = {model: without_temperature(values, temperatures[model]) for model, values in predictions.models.items()}
    titles = ", ".join(f"{LOOKS[model].title} {temperatures[model]:.2f}" for model in plain)
    sides = [("Does a probability mean what it says?", plain)]
    if {temperatures[model] for model in plain} != {1.0}:
        sides = [("Without temperature", plain), (f"With temperature: {titles}", predictions.models)]
    figure = new_figure(2.2 + 4.8 * len(sides), 6.6)
    panels = figure.subplots(2, len(sides), sharex=True, sharey="row", height_ratios=(3, 1.2), squeeze=False)
    for (upper, lower), (title, models) in zip(panels.T, sides, strict=True):
        offsets = (-0.011, 0.011) if len(models) > 1 else (0.0,)
        for offset, (model, values) in zip(offsets, models.items(), strict=True):
            right = predicted_labels(values) == predictions.labels
            _draw_rates(upper, values.max(axis=1), right, model)
            _draw_counts(lower, values.max(axis=1), model, offset)
        upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="perfectly calibrated")
        upper.set_title(title)
        upper.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.01))
        lower.set_xlabel("probability of the predicted class")
        lower.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    upper, lower = panels[:, 0]
    lowest = float(_EDGES[np.searchsorted(_EDGES, 1 / len(predictions.classes), "right") - 1])
    upper.set(ylabel="fraction right", ylim=(-0.03, 1.03), xlim=(lowest - 0.01, 1.01))
    upper.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    lower.set_ylabel("test images")
    count_on_log_axis(lower, most=8 * len(predictions.labels))
    return figure


def _draw_rates(axes: Axes, top: _Floats, right: NDArray[np.bool_], model: str) -> None:
    look = LOOKS[model]
    places, rates, errors = _bin_rates(top, right)
    axes.errorbar(
        places,
        rates,
        errors,
        fmt=look.marker,
        zorder=5 - look.layer,
        color=look.color,
        markersize=look.marker_size,
        elinewidth=1.2,
        capsize=3,
        label=f"{look.title}, calibration error {percent(expected_calibration_error(right, top))}",
    )


def _draw_counts(axes: Axes, top: _Floats, model: str, offset: float) -> None:
    look, counts = LOOKS[model], np.bincount(confidence_bins(top), minlength=CALIBRATION_BINS)
    color, hatch = (look.color, None) if model == "finetuned" else ("white", "/////")
    bars = axes.bar(
        (_EDGES[:-1] + _EDGES[1:]) / 2 + offset, counts, 0.022, color=color, hatch=hatch, edgecolor=look.color
    )
    axes.bar_label(bars, [f"{count:,}" if count else "" for count in counts], fontsize=6, rotation=90, padding=2)


def _bin_rates(top: _Floats, right: NDArray[np.bool_]) -> tuple[_Floats, _Floats, _Floats]:
    """Return each filled bin's mean probability, fraction right, and the interval's reach below and above, (2, n)."""
    places, rates, errors = [], [], []
    bins = confidence_bins(top)
    for place in np.unique(bins):
        inside = bins == place
        count, total = int(right[inside].sum()), int(inside.sum())
        low, high = wilson_interval(count, total)
        places.append(top[inside].mean())
        rates.append(count / total)
        errors.append((max(count / total - low, 0), max(high - count / total, 0)))
    return np.array(places), np.array(rates), np.array(errors).T


@house_style()
def draw_coverage(predictions: Predictions, calibrations: Calibrations) -> Figure:
    """Draw how many mistakes are left when the least sure images are left to a person, for each checkpoint.

    A ring marks what the threshold that validation images gave comes to.
    """
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    highest = MOST_WRONG
    for model, values in predictions.models.items():
        look = LOOKS[model]
        answered, wrong = risk_curve(predictions.labels, values)
        highest = max(highest, float(wrong[answered > 0.1].max(initial=0)))
        # The surest image is where the axis begins.
        answered, wrong = np.append(0, answered), np.append(wrong[0], wrong)
        axes.plot(answered, wrong, look.line, color=look.color, linewidth=2, zorder=look.layer, label=look.title)
    axes.axhline(MOST_WRONG, color=GREY, linewidth=1, linestyle=":", label=f"{MOST_WRONG:.0%} of the answers")
    coverage = calibrations.coverage
    if coverage.answered:
        place = (1 - coverage.left, coverage.mistakes / coverage.answered)
        label = f"{probability(coverage.left)} left to a person, by validation"
        axes.plot(*place, "o", markersize=12, fillstyle="none", color="black", clip_on=False, zorder=5, label=label)
    # One early mistake is half of two answers: that spike would flatten all else.
    axes.set(
        xlim=(0, 1.005),
        ylim=(0, max(1.1 * highest, 2 * MOST_WRONG)),
        xlabel="share of the test images that is answered",
    )
    axes.set(ylabel="wrong among the answers", title="Error rate against share answered, most confident first")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(xmax=1))
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure
