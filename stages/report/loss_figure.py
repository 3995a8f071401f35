"""The figure of the log-losses of single images, and its caption."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from stages.common.format import percent, plural, probability
from stages.report.style import LOOKS, count_on_log_axis, house_style, new_figure, use_log_axis, wrap
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions, image_losses

# Below this loss, nats, an image counts as certain; it keeps the axis short.
_LEAST = 1e-8

_Floats = NDArray[np.float64]


@house_style()
def draw_losses(predictions: Predictions) -> Figure:
    """Draw how the log-losses of the images are distributed, and which share of their sum the highest ones have.

    The caption is computed: it says how few images make the mean loss, which is how it can rise while accuracy does
    not fall.
    """
    losses = {model: image_losses(predictions.labels, values) for model, values in predictions.models.items()}
    figure = new_figure(10, 5.6 if len(losses) > 1 else 3.6)
    grid = figure.add_gridspec(len(losses), 2, width_ratios=(1.6, 1))
    upper = figure.add_subplot(grid[0, 0])
    panels = [upper, *(figure.add_subplot(grid[row, 0], sharex=upper, sharey=upper) for row in range(1, len(losses)))]
    every = np.concatenate([np.maximum(values, _LEAST) for values in losses.values()])
    low, high = np.floor(np.log10(every.min())), np.ceil(np.log10(max(every.max(), 1)))
    bins, tallest = np.logspace(low, high, int(high - low) * 5 + 1).tolist(), 1.0
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
    # A decade for the legend, and half of one for the numbers of the tallest bar.
    count_on_log_axis(upper, most=30 * tallest)
    use_log_axis(upper, "x")
    clipped = f"; leftmost: {_LEAST:g} or less" if any(values.min() < _LEAST for values in losses.values()) else ""
    panels[-1].set_xlabel(f"log-loss of an image, nats{clipped}")
    _draw_shares(figure.add_subplot(grid[:, 1]), losses)
    figure.supxlabel(wrap(describe_losses(predictions), 9.6, 9), x=0.01, ha="left", size=9)
    return figure


def _draw_shares(axes: Axes, losses: dict[str, _Floats]) -> None:
    """Draw which share of the sum the images with the highest losses have, against how many they are."""
    count = 0
    for model, values in losses.items():
        look, descending = LOOKS[model], np.sort(values)[::-1]
        total, count = descending.sum(), len(descending)
        shares, marker = np.cumsum(descending) / (total if total > 0 else 1), look.marker if count < 20 else None
        style: dict[str, Any] = {"color": look.color, "linewidth": 2.2, "zorder": look.layer, "label": look.title}
        axes.plot(np.arange(1, count + 1), shares, look.line, marker=marker, **style)
    axes.set_title("Share of the loss in the highest-loss images")
    use_log_axis(axes, "x")
    axes.set(xlabel="number of highest-loss images", ylabel="share of the total loss", ylim=(0, 1.02))
    axes.set_xlim(0.9, 1.1 * max(count, 2))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(loc="lower right", fontsize=8)


def describe_losses(predictions: Predictions) -> str:
    """Say in words, from the numbers, which images have most of the loss, and whether it rose though accuracy did not.

    A line for each checkpoint, and one on the change.
    """
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
