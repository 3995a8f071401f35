"""The figure of the log-losses of single images, and its caption."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from stages.common.format import percent, plural, probability
from stages.report.style import LOOKS, Look, count_on_log_axis, house_style, new_figure, use_log_axis, wrap
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions, image_losses

# Below this loss, nats, an image counts as certain; it keeps the axis short.
_LEAST = 1e-8

_Floats = NDArray[np.float64]


@house_style()
def draw_losses(predictions: Predictions) -> Figure:
    """Draw how the log-losses of the images are spread, and which share of their sum the heaviest ones carry.

    The caption is computed: it says how few images make the mean loss, which is how it can rise while accuracy does
    not fall.
    """
    losses = {model: image_losses(predictions.labels, values) for model, values in predictions.models.items()}
    figure = new_figure(10, 5.6 if len(losses) > 1 else 3.6)
    grid = figure.add_gridspec(len(losses), 2, width_ratios=(1.6, 1))
    upper = figure.add_subplot(grid[0, 0])
    spreads = [upper, *(figure.add_subplot(grid[row, 0], sharex=upper, sharey=upper) for row in range(1, len(losses)))]
    right = figure.add_subplot(grid[:, 1])
    every = np.concatenate([np.maximum(values, _LEAST) for values in losses.values()])
    low, high = np.floor(np.log10(every.min())), np.ceil(np.log10(max(every.max(), 1)))
    bins = np.logspace(low, high, int(high - low) * 5 + 1)
    tallest = 0.0
    for axes, (model, values) in zip(spreads, losses.items(), strict=True):
        tallest = max(tallest, _draw_spread(axes, values, bins, LOOKS[model]))
        if len(predictions.classes) == 2:
            axes.axvline(np.log(2), color="black", linewidth=1, linestyle=":", label="wrong beyond (probability 50%)")
        axes.legend(fontsize=8, loc="upper left", handlelength=1.6)
    # A decade for the legend, and half of one for the numbers of the tallest bar.
    count_on_log_axis(upper, most=30 * max(tallest, 1))
    use_log_axis(upper, "x")
    for axes in spreads[:-1]:
        axes.tick_params(labelbottom=False)
    clipped = f"; leftmost: {_LEAST:g} or less" if any(values.min() < _LEAST for values in losses.values()) else ""
    spreads[-1].set_xlabel(f"log-loss of an image, nats{clipped}")
    _draw_shares(right, losses)
    figure.supxlabel(wrap(describe_losses(predictions), 9.6, 9), x=0.01, ha="left", size=9)
    return figure


def _draw_spread(axes: Axes, losses: _Floats, bins: _Floats, look: Look) -> float:
    """Draw a histogram and the mean; return the height of the tallest bar."""
    heights, *_ = axes.hist(
        np.maximum(losses, _LEAST), bins.tolist(), color=look.color, edgecolor="white", linewidth=0.5
    )
    mean = float(losses.mean())
    axes.axvline(max(mean, _LEAST), color="black", linestyle="--", linewidth=1.6, label=f"mean {mean:.3g}")
    axes.set(ylabel="test images")
    axes.set_title(f"{look.title}: how the losses are spread")
    return float(np.max(heights))


def _draw_shares(axes: Axes, losses: dict[str, _Floats]) -> None:
    """Draw which share of the sum the heaviest images carry, against how many they are."""
    images = 0
    for model, values in losses.items():
        look, heaviest = LOOKS[model], np.sort(values)[::-1]
        total, images = heaviest.sum(), len(heaviest)
        axes.plot(
            np.arange(1, images + 1),
            np.cumsum(heaviest) / (total if total > 0 else 1),
            look.line,
            marker=look.marker if images < 20 else None,
            color=look.color,
            linewidth=2.2,
            zorder=look.layer,
            label=look.title,
        )
    axes.set_title("Share of the loss in the highest-loss images")
    use_log_axis(axes, "x")
    axes.set(xlabel="number of highest-loss images", ylabel="share of the total loss", ylim=(0, 1.02))
    axes.set_xlim(0.9, 1.1 * max(images, 2))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(loc="lower right", fontsize=8)


def describe_losses(predictions: Predictions) -> str:
    """Say in words, from the numbers, who carries the loss and whether it rose while accuracy did not fall."""
    means, accuracies, lines = {}, {}, []
    for model, probabilities in predictions.models.items():
        look, values = LOOKS[model], image_losses(predictions.labels, probabilities)
        wrong = predicted_labels(probabilities) != predictions.labels
        means[model], accuracies[model] = float(values.mean()), float(1 - wrong.mean())
        count = max(1, round(len(values) / 100))
        heaviest, total = np.sort(values)[::-1], float(values.sum())
        if total < _LEAST * len(values):
            lines.append(f"{look.title.capitalize()}: the mean loss is below {_LEAST:g}.")
            continue
        share = probability(float(heaviest[:count].sum()) / total)
        worst = "worst image carries" if count == 1 else f"worst 1% ({count} images) carry"
        mistakes = plural(int(wrong.sum()), "mistake")
        part = probability(float(values[wrong].sum()) / total)
        text = f"the {mistakes} {part}" if wrong.any() else "there are no mistakes"
        images = plural(len(values), "image")
        lines.append(f"{look.title.capitalize()}: the {worst} {share} of the total loss of {images}; {text}.")
    if predictions.identical:
        return "\n".join(lines)
    before, after = (image_losses(predictions.labels, values) for values in predictions.models.values())
    wrong = predicted_labels(predictions.finetuned) != predictions.labels
    by_mistakes, by_others = (float((after - before)[chosen].sum()) / len(wrong) for chosen in (wrong, ~wrong))
    lines.append(
        f"Mean loss {means['head']:.4g} → {means['finetuned']:.4g}, "
        f"accuracy {percent(accuracies['head'])} → {percent(accuracies['finetuned'])}. "
        f"To the change in mean loss the fine-tuned network's mistakes add {by_mistakes:+.2g}, "
        f"all other images {by_others:+.2g}."
    )
    if means["finetuned"] > means["head"] and accuracies["finetuned"] >= accuracies["head"]:
        lines.append("So the loss rose although no more images are wrong.")
    return "\n".join(lines)
