"""The figures of what a probability is worth: how often it is right, what it is good for, where the loss comes from."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stages.common.format import percent, plural, probability
from stages.report.style import GREY, LOOKS, count_on_log_axis, new_figure, use_log_axis, use_percent, wrap
from stages.scores.calibration import MOST_WRONG, Calibrations, risk_curve, without_temperature
from stages.scores.metrics import CALIBRATION_BINS as BINS
from stages.scores.metrics import confidence_bins, expected_calibration_error, predicted_labels, wilson_interval
from stages.scores.predictions import Predictions, image_losses

_Floats = NDArray[np.float64]

# Below this loss, nats, an image counts as certain; it keeps the axis short.
_LEAST = 1e-8
_EDGES = np.linspace(0, 1, BINS + 1)


def draw_reliability(predictions: Predictions, calibrations: Calibrations) -> Figure:
    """Draw accuracy over the top probability, in 15 bins, and how many images each has, without and with temperatures.

    Where a checkpoint's probabilities are right, its points lie on the diagonal (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). Bars are Wilson's 95% interval: a bin of three images says little.
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
            _draw_bins(upper, lower, values.max(axis=1), right, model, offset)
        upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="perfectly calibrated")
        upper.set_title(title)
        upper.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.01))
        lower.set_xlabel("probability of the predicted class")
        use_percent(lower, "x")
    upper, lower = panels[:, 0]
    lowest = float(_EDGES[np.searchsorted(_EDGES, 1 / len(predictions.classes), "right") - 1])
    upper.set(ylabel="fraction right", ylim=(-0.03, 1.03), xlim=(lowest - 0.01, 1.01))
    use_percent(upper, "y")
    lower.set_ylabel("test images")
    count_on_log_axis(lower, most=8 * len(predictions.labels))
    return figure


def _draw_bins(upper: Axes, lower: Axes, top: _Floats, right: NDArray[np.bool_], model: str, offset: float) -> None:
    """Draw each filled bin's fraction right over its mean probability, and below how many images it has."""
    look, bins = LOOKS[model], confidence_bins(top)
    counts = np.bincount(bins, minlength=BINS)
    places, rates, errors = [], [], []
    for place in np.flatnonzero(counts):
        hits, total = int(right[bins == place].sum()), int(counts[place])
        low, high = wilson_interval(hits, total)
        places.append(top[bins == place].mean())
        rates.append(hits / total)
        errors.append((max(hits / total - low, 0), max(high - hits / total, 0)))
    label = f"{look.title}, calibration error {percent(expected_calibration_error(right, top))}"
    how: dict[str, Any] = {"fmt": look.marker, "color": look.color, "markersize": look.marker_size, "label": label}
    upper.errorbar(places, rates, np.array(errors).T, zorder=5 - look.layer, elinewidth=1.2, capsize=3, **how)
    color, hatch = (look.color, None) if model == "finetuned" else ("white", "/////")
    middles = (_EDGES[:-1] + _EDGES[1:]) / 2 + offset
    bars = lower.bar(middles, counts, 0.022, color=color, hatch=hatch, edgecolor=look.color)
    lower.bar_label(bars, [f"{count:,}" if count else "" for count in counts], fontsize=6, rotation=90, padding=2)


def draw_coverage(predictions: Predictions, calibrations: Calibrations) -> Figure:
    """Draw how many mistakes are left when the least sure images are left to a person; ring: by `calibrations`."""
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
    axes.set(xlim=(0, 1.005), ylim=(0, max(1.1 * highest, 2 * MOST_WRONG)))
    axes.set(xlabel="share of the test images that is answered", ylabel="wrong among the answers")
    axes.set_title("Error rate against share answered, most confident first")
    use_percent(axes, "xy")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def draw_losses(predictions: Predictions) -> Figure:
    """Draw how the images' log-losses are distributed, and which share of their sum the highest ones have."""
    losses = {model: image_losses(predictions.labels, values) for model, values in predictions.models.items()}
    figure = new_figure(10, 5.6 if len(losses) > 1 else 3.6)
    grid = figure.add_gridspec(len(losses), 2, width_ratios=(1.6, 1))
    upper = figure.add_subplot(grid[0, 0])
    panels = [upper, *(figure.add_subplot(grid[row, 0], sharex=upper, sharey=upper) for row in range(1, len(losses)))]
    every = np.concatenate([np.maximum(values, _LEAST) for values in losses.values()])
    low, high = np.floor(np.log10(every.min())), np.ceil(np.log10(max(every.max(), 1)))
    bins, tallest = np.logspace(low, high, int(high - low) * 5 + 1).tolist(), 1.0
    side, count = figure.add_subplot(grid[:, 1]), len(predictions.labels)
    for axes, (model, values) in zip(panels, losses.items(), strict=True):
        look, mean = LOOKS[model], float(values.mean())
        heights, *_ = axes.hist(np.maximum(values, _LEAST), bins, color=look.color, edgecolor="white", linewidth=0.5)
        tallest = max(tallest, float(np.max(heights)))
        axes.axvline(max(mean, _LEAST), color="black", linestyle="--", linewidth=1.6, label=f"mean {mean:.3g}")
        if len(predictions.classes) == 2:
            axes.axvline(np.log(2), color="black", linewidth=1, linestyle=":", label="wrong beyond (probability 50%)")
        axes.set_ylabel("test images")
        axes.set_title(f"{look.title}: distribution of the losses")
        axes.legend(fontsize=8, loc="upper left", handlelength=1.6)
        axes.tick_params(labelbottom=axes is panels[-1])
        shares = np.cumsum(np.sort(values)[::-1]) / (values.sum() or 1)
        marker = look.marker if count < 20 else None
        (line,) = side.plot(np.arange(1, count + 1), shares, look.line, marker=marker, color=look.color, linewidth=2.2)
        line.set(zorder=look.layer, label=look.title)
    # A decade for the legend, and half of one for the numbers of the tallest bar.
    count_on_log_axis(upper, most=30 * tallest)
    use_log_axis(upper, "x")
    clipped = f"; leftmost: {_LEAST:g} or less" if any(values.min() < _LEAST for values in losses.values()) else ""
    panels[-1].set_xlabel(f"log-loss of an image, nats{clipped}")
    side.set_title("Share of the loss in the highest-loss images")
    use_log_axis(side, "x")
    side.set(xlabel="number of highest-loss images", ylabel="share of the total loss", ylim=(0, 1.02))
    side.set_xlim(0.9, 1.1 * max(count, 2))
    use_percent(side, "y")
    side.legend(loc="lower right", fontsize=8)
    figure.supxlabel(wrap(describe_losses(predictions), 9.6, 9), x=0.01, ha="left", size=9)
    return figure


def describe_losses(predictions: Predictions) -> str:
    """Say in lines which images have most of the loss, and whether it rose though accuracy did not fall."""
    lines, losses, mistakes = [], {}, {}
    for model, probabilities in predictions.models.items():
        title, values = LOOKS[model].title.capitalize(), image_losses(predictions.labels, probabilities)
        wrong = predicted_labels(probabilities) != predictions.labels
        losses[model], mistakes[model] = values, wrong
        count, total = max(1, round(len(values) / 100)), float(values.sum())
        if total < _LEAST * len(values):
            lines.append(f"{title}: the mean loss is below {_LEAST:g}.")
            continue
        share = probability(float(np.sort(values)[::-1][:count].sum()) / total)
        worst = "worst image carries" if count == 1 else f"worst 1% ({count} images) carry"
        part = f"the {plural(int(wrong.sum()), 'mistake')} {probability(float(values[wrong].sum()) / total)}"
        part = part if wrong.any() else "there are no mistakes"
        lines.append(f"{title}: the {worst} {share} of the total loss of {plural(len(values), 'image')}; {part}.")
    if predictions.identical:
        return "\n".join(lines)
    (before, after), (wrong_before, wrong) = losses.values(), mistakes.values()
    by_mistakes, by_others = (float((after - before)[chosen].sum()) / len(wrong) for chosen in (wrong, ~wrong))
    lines.append(
        f"Mean loss {before.mean():.4g} → {after.mean():.4g}, accuracy {percent(1 - wrong_before.mean())} → "
        f"{percent(1 - wrong.mean())}. To the change in mean loss the fine-tuned network's mistakes add "
        f"{by_mistakes:+.2g}, all other images {by_others:+.2g}."
    )
    if after.mean() > before.mean() and wrong.sum() <= wrong_before.sum():
        lines.append("So the loss rose although no more images are wrong.")
    return "\n".join(lines)
