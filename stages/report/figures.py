"""Figures of numbers: histories, confusion matrices, curves, calibration and losses."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stages.common.format import number, percent, plural, probability
from stages.report.style import GREY, LOOKS, count_on_log_axis, new_figure, short_names, use_log_axis, use_percent, wrap
from stages.scores.calibration import MOST_WRONG, Calibrations, risk_curve, without_temperature
from stages.scores.curves import GRID, Curves, counted_classes, precision_recall_curves, roc_curves
from stages.scores.metrics import CALIBRATION_BINS as BINS
from stages.scores.metrics import (
    Floats,
    Scores,
    confidence_bins,
    expected_calibration_error,
    predicted_labels,
    wilson_interval,
)
from stages.scores.predictions import Predictions, find_confused, image_losses
from stages.training.history import Epoch
from stages.training.line import Point

# With more classes: no numbers in the cells of a confusion matrix; no names beside it.
_CLASSES_WITH_NUMBERS, _CLASSES_WITH_NAMES = 12, 40
_LOG_RANGE = 30
# If both areas are above this, the corner of the curves is enlarged, this wide.
_ZOOM_FROM, _ZOOM = 0.95, 0.15
# Below this loss, nats, an image counts as certain; it keeps the axis short.
_LEAST = 1e-8
_EDGES = np.linspace(0, 1, BINS + 1)


def draw_training(
    histories: Sequence[Sequence[Epoch]], kept: Sequence[tuple[int, float]], line: Sequence[Point] = ()
) -> Figure:
    """Draw loss and accuracy of both phases over epochs, with a ring around what was `kept` (`read_kept`).

    Beside them the points of the `line` from start to end of fine-tuning, if there are any.
    """
    (head_epoch, _), (finetune_epoch, alpha) = kept
    figure = new_figure(10.5 if line else 8, 6)
    grid = figure.subplots(2, 2 if line else 1, sharex="col", squeeze=False, width_ratios=(2.4, 1) if line else None)
    losses, accuracies = grid[:, 0]
    panels = ((losses, "loss", "train_loss", "val_loss"), (accuracies, "accuracy", "train_accuracy", "accuracy"))
    first, every = 0, [epoch for phase in histories for epoch in phase]
    for phase, look, (number_kept, _) in zip(histories, LOOKS.values(), kept, strict=True):
        ring = [epoch.number for epoch in phase].index(number_kept)
        for axes, name, training, validation in panels:
            for series, dashes, face in ((training, ":", "white"), (validation, "-", look.color)):
                # A series may lack a value: epoch 0 has no training loss.
                values = [math.nan if (value := getattr(epoch, series)) is None else value for epoch in phase]
                label = f"{look.title}: {'training' if series == training else 'validation'}"
                marker = {"marker": look.marker, "markersize": 5 if len(phase) <= 30 else 3, "markerfacecolor": face}
                axes.plot(range(first, first + len(phase)), values, dashes, color=look.color, label=label, **marker)
            # A point inside the line is no epoch.
            if not first or alpha in (0, 1):
                _ring(axes, first + ring, getattr(phase[ring], validation))
            axes.set_ylabel(name)
        first += len(phase)
    handover = len(histories[0])
    for axes in (losses, accuracies):
        axes.set_xlim(-0.6, first - 0.4)
        axes.axvline(handover - 0.5, color="black", linewidth=1)
    both = [loss for epoch in every for loss in (epoch.train_loss, epoch.val_loss) if loss is not None]
    if 0 < _LOG_RANGE * min(both) < max(both):
        use_log_axis(losses, "y")
    else:
        losses.set_ylim(0, 1.1 * max(both))
    accuracies.margins(y=0.1)
    losses.set_title(f"head phase: epoch {head_epoch} kept ◯")
    losses.set_title("fine-tuning" if 0 < alpha < 1 else f"fine-tuning: epoch {finetune_epoch} kept ◯", loc="right")
    use_percent(accuracies, "y")
    accuracies.set_xlabel("epoch of the phase")
    # Epochs are numbered from 0 again in the second phase.
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, first) if step * 20 >= first)
    places = [*range(0, handover, step), *range(handover, first, step)]
    accuracies.set_xticks(places, [str(every[place].number) for place in places])
    if line:
        _draw_line(grid[0, 1], grid[1, 1], line, alpha)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_line(losses: Axes, accuracies: Axes, line: Sequence[Point], alpha: float) -> None:
    look = LOOKS["finetuned"]
    for axes, name in ((losses, "val_loss"), (accuracies, "accuracy")):
        known = {point.alpha: value for point in line if math.isfinite(value := getattr(point, name))}
        axes.plot(list(known), list(known.values()), color=look.color, marker=look.marker, markersize=5)
        _ring(axes, alpha, known[alpha])
        axes.margins(x=0.1, y=0.15)
    losses.set_title(f"on the line: {alpha:.0%} kept ◯")
    accuracies.set_xlabel("part of the change kept")
    use_percent(accuracies, "xy")


def _ring(axes: Axes, place: float, height: float) -> None:
    axes.plot(place, height, "o", markersize=15, fillstyle="none", color="black", markeredgewidth=1.3)


def draw_confusion(predictions: Predictions) -> Figure:
    """Draw each checkpoint's confusion matrix: rows are true classes, columns predictions, shades fractions of a row.

    With many classes the most frequent confusions are written out below; with very many, rows and columns are labels.
    """
    from sklearn.metrics import confusion_matrix

    classes = len(predictions.classes)
    few, names = classes <= _CLASSES_WITH_NUMBERS, short_names(predictions.classes, 22)
    # Space for one line of text per class.
    panel = max(5 if classes <= 3 else 6.2 if few else 7, 2.5 + 0.16 * min(classes, _CLASSES_WITH_NAMES))
    figure = new_figure(1 + max(5, panel - 2) * len(predictions.models), panel)
    panels = figure.subplots(1, len(predictions.models), squeeze=False)[0]
    for axes, (model, probabilities) in zip(panels, predictions.models.items(), strict=True):
        predicted = predicted_labels(probabilities)
        counts = confusion_matrix(predictions.labels, predicted, labels=range(classes))
        totals = counts.sum(axis=1, keepdims=True)
        empty = np.broadcast_to(totals == 0, counts.shape)
        shares = np.ma.masked_array(counts / np.maximum(totals, 1), mask=empty)
        colors = colormaps["Blues"].with_extremes(bad="#e8e8e8")
        # The square root makes single mistakes visible beside a full diagonal.
        image = axes.imshow(shares, cmap=colors, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        right = int(np.trace(counts))
        axes.set_title(f"{LOOKS[model].title}: {right:,} of {plural(len(predicted), 'image')} right")
        axes.set(xlabel="predicted", ylabel="true")
        axes.grid(visible=False)
        if few:
            for (row, column), count in np.ndenumerate(counts):
                dark = totals[row, 0] > 0 and shares[row, column] > 0.45
                size, color = 13 if classes <= 3 else 9 if classes <= 8 else 7, "white" if dark else "black"
                axes.text(column, row, f"{count:,}", ha="center", va="center", size=size, color=color)
        else:
            axes.set_xlabel(f"predicted\n\n{_most_confused(predictions, model, names)}", size=8)
        if classes <= _CLASSES_WITH_NAMES:
            letters = 9 if classes <= 10 else 6.5
            axes.set_xticks(range(classes), names, size=letters)
            axes.tick_params("x", rotation=0 if classes * max(map(len, names)) <= 48 else 90)
            axes.set_yticks(range(classes), names, size=letters)
    bar = figure.colorbar(image, ax=panels, shrink=0.7, aspect=30, label="fraction of the true class's images")
    use_percent(bar.ax, "y")
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    return figure


def _most_confused(predictions: Predictions, model: str, names: list[str]) -> str:
    pairs = find_confused(predictions, model)
    if not pairs:
        return f"no mistakes on {plural(len(predictions.labels), 'image')}"
    lines = [f"{len(found):,} of {names[true]} taken for {names[guess]}" for true, guess, found in pairs[:5]]
    return "\n".join(["most frequent mistakes:", *lines])


def draw_curves(predictions: Predictions, scores: dict[str, Scores]) -> Figure | str:
    """Draw ROC and precision-recall of each checkpoint, their areas, as in `scores`, in the legends."""
    counted, names = counted_classes(predictions), short_names(predictions.classes, 30)
    if not counted:
        return "There are no curves: they need test images of two classes."
    figure = new_figure(10, 6)
    left, right = figure.subplots(1, 2)
    title = f"one class against the rest, mean over {plural(len(counted), 'class', 'classes')} (macro)"
    if len(predictions.classes) == 2:
        title = f"positive: {names[1]}"
    share = float(np.mean([np.mean(predictions.labels == label) for label in counted]))
    for axes, curves, name, area, key in (
        (left, roc_curves(predictions), "ROC", "area", "auroc"),
        (right, precision_recall_curves(predictions), "Precision-recall", "average precision", "average_precision"),
    ):
        areas = {model: getattr(scores[model], key) for model in predictions.models}
        for model, value in areas.items():
            label = f"{LOOKS[model].title}, {area} {'undefined' if value is None else number(value)}"
            _draw_curve(axes, curves, model, label=label, clip_on=False)
        if all((value or 0) > _ZOOM_FROM for value in areas.values()):
            _enlarge_corner(axes, curves, corner=0.0 if axes is left else 1.0)
        if axes is left:
            axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label="chance")
        else:
            axes.axhline(share, color=GREY, linewidth=0.8, linestyle=":", label=f"chance ({share:.1%})")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
        axes.set_title(f"{name}\n{title}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9)
    left.set(xlabel="false positive rate", ylabel="true positive rate")
    right.set(xlabel="recall", ylabel="precision")
    return figure


def _draw_curve(axes: Axes, curves: Curves, model: str, **more: Any) -> None:  # noqa: ANN401 (of matplotlib)
    look = LOOKS[model]
    axes.plot(GRID, curves[model], look.line, color=look.color, linewidth=2.2, zorder=look.layer, **more)


def _enlarge_corner(axes: Axes, curves: Curves, corner: float) -> None:
    """Enlarge the corner of good curves, at x = 0 or 1 and y = 1, where they differ."""
    shown = (-0.005, _ZOOM) if corner == 0 else (1 - _ZOOM, 1.005)
    inset = axes.inset_axes((0.3, 0.32, 0.55, 0.55))
    for model in curves:
        _draw_curve(inset, curves, model)
    inset.tick_params(labelsize=7)
    inset.set(xticks=np.arange(0, 1.01, 0.05), yticks=np.arange(0, 1.01, 0.05), xlim=shown, ylim=(1 - _ZOOM, 1.005))
    inset.spines[["top", "right"]].set_visible(True)
    axes.indicate_inset_zoom(inset, edgecolor="black")


def draw_reliability(predictions: Predictions, calibrations: Calibrations) -> Figure:
    """Draw accuracy over the top probability, in 15 bins, and how many images each has, without and with temperatures.

    A calibrated checkpoint's points lie on the diagonal (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). Bars are Wilson's 95% interval: a bin of three images says little.
    """
    temperatures = calibrations.temperatures
    plain = {model: without_temperature(values, temperatures[model]) for model, values in predictions.models.items()}
    titles = ", ".join(f"{LOOKS[model].title} {temperatures[model]:.2f}" for model in plain)
    sides = [("Without temperature", plain), (f"With temperature: {titles}", predictions.models)]
    if set(temperatures.values()) == {1.0}:
        sides = [("Does a probability mean what it says?", plain)]
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


def _draw_bins(upper: Axes, lower: Axes, top: Floats, right: NDArray[np.bool_], model: str, offset: float) -> None:
    """Draw each filled bin's fraction right over its mean probability, and below how many images it has."""
    look, bins = LOOKS[model], confidence_bins(top)
    counts = np.bincount(bins, minlength=BINS)
    places, rates, errors = [], [], []
    for own in (bins == place for place in np.flatnonzero(counts)):
        rate, (low, high) = right[own].mean(), wilson_interval(int(right[own].sum()), int(own.sum()))
        places.append(top[own].mean())
        rates.append(rate)
        errors.append((max(rate - low, 0), max(high - rate, 0)))
    label = f"{look.title}, calibration error {percent(expected_calibration_error(right, top))}"
    how: dict[str, Any] = {"fmt": look.marker, "color": look.color, "markersize": look.marker_size, "label": label}
    upper.errorbar(places, rates, np.array(errors).T, zorder=5 - look.layer, elinewidth=1.2, capsize=3, **how)
    color, hatch = (look.color, None) if model == "finetuned" else ("white", "/////")
    middles = (_EDGES[:-1] + _EDGES[1:]) / 2 + offset
    bars = lower.bar(middles, counts, 0.022, color=color, hatch=hatch, edgecolor=look.color)
    lower.bar_label(bars, [f"{count:,}" if count else "" for count in counts], fontsize=6, rotation=90, padding=2)


def draw_coverage(predictions: Predictions, calibrations: Calibrations) -> Figure:
    """Draw the error rate over the share of answered images, most confident first; ring: the chosen threshold."""
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    highest = 2 * MOST_WRONG
    for model, values in predictions.models.items():
        look = LOOKS[model]
        _, answered, wrong = risk_curve(predictions.labels, values)
        # One early mistake is half of two answers, a spike that would flatten the rest.
        highest = max(highest, 1.1 * float(wrong[answered > 0.1].max(initial=0)))
        # The axis begins at the most confident image.
        answered, wrong = np.append(0, answered), np.append(wrong[0], wrong)
        axes.plot(answered, wrong, look.line, color=look.color, linewidth=2, zorder=look.layer, label=look.title)
    axes.axhline(MOST_WRONG, color=GREY, linewidth=1, linestyle=":", label=f"{MOST_WRONG:.0%} of the answers")
    coverage = calibrations.coverage
    if coverage.answered:
        place = (1 - coverage.left, coverage.mistakes / coverage.answered)
        label = f"{probability(coverage.left)} left to a person, by validation"
        axes.plot(*place, "o", markersize=12, fillstyle="none", color="black", clip_on=False, zorder=5, label=label)
    axes.set(xlim=(0, 1.005), ylim=(0, highest))
    axes.set(xlabel="share of the test images that is answered", ylabel="wrong among the answers")
    axes.set_title("Error rate against share answered, most confident first")
    use_percent(axes, "xy")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def draw_losses(predictions: Predictions) -> Figure:
    """Draw the distribution of the images' log-losses, and the share of the highest ones in their sum."""
    losses = {model: image_losses(predictions.labels, values) for model, values in predictions.models.items()}
    figure = new_figure(10, 5.6 if len(losses) > 1 else 3.6)
    grid = figure.add_gridspec(len(losses), 2, width_ratios=(1.6, 1))
    upper = figure.add_subplot(grid[0, 0])
    panels = [upper, *(figure.add_subplot(grid[row, 0], sharex=upper, sharey=upper) for row in range(1, len(losses)))]
    lowest, highest = (function(list(losses.values())) for function in (np.min, np.max))
    low, high = np.floor(np.log10(max(lowest, _LEAST))), np.ceil(np.log10(max(highest, 1)))
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
    clipped = f"; leftmost: {_LEAST:g} or less" if lowest < _LEAST else ""
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
    """Return lines on the images with most of the loss, and on a loss that rose while accuracy did not fall."""
    lines, losses, mistakes = [], [], []
    for model, probabilities in predictions.models.items():
        title, values = LOOKS[model].title.capitalize(), image_losses(predictions.labels, probabilities)
        wrong = predicted_labels(probabilities) != predictions.labels
        losses.append(values)
        mistakes.append(wrong)
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
    (before, after), (wrong_before, wrong) = losses, mistakes
    by_mistakes, by_others = (float((after - before)[chosen].sum()) / len(wrong) for chosen in (wrong, ~wrong))
    lines.append(
        f"Mean loss {before.mean():.4g} → {after.mean():.4g}, accuracy {percent(1 - wrong_before.mean())} → "
        f"{percent(1 - wrong.mean())}. To the change in mean loss the fine-tuned network's mistakes add "
        f"{by_mistakes:+.2g}, all other images {by_others:+.2g}."
    )
    if after.mean() > before.mean() and wrong.sum() <= wrong_before.sum():
        lines.append("So the loss rose although no more images are wrong.")
    return "\n".join(lines)
