"""The figures of numbers: histories, confusion, curves, several runs; and all of one run together."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from stages.common.format import number, percent, plural
from stages.report.probability_figures import draw_coverage, draw_losses, draw_reliability
from stages.report.style import GREY, LOOKS, new_figure, short_names, use_log_axis, use_percent
from stages.scores.calibration import Calibrations
from stages.scores.curves import Curve, counted_classes, precision_recall_curves, roc_curves
from stages.scores.folds import Together
from stages.scores.metrics import Scores, predicted_labels
from stages.scores.predictions import Predictions, find_confused
from stages.training.history import Epoch
from stages.training.line import Point

# More classes than these: no numbers in the cells of a confusion matrix, not every class in it.
_CLASSES_WITH_NUMBERS = 12
_CLASSES_SHOWN = 40
_LOG_RANGE = 30
# Where both areas are above this, the corner of the curves is enlarged, this wide.
_ZOOM_FROM, _ZOOM = 0.95, 0.15


def draw_numbers(
    predictions: Predictions,
    scores: dict[str, Scores],
    histories: tuple[Sequence[Epoch], Sequence[Epoch]],
    selected: tuple[int, int],
    calibrations: Calibrations,
    line: tuple[Sequence[Point], float],
) -> dict[str, Figure | str]:
    """Draw the figures by name, or say why there is none; `histories` and `selected` are of both phases."""
    return {
        "training": draw_training(*histories, selected, *line),
        "confusion": draw_confusion(predictions),
        "curves": draw_curves(predictions, scores),
        "reliability": draw_reliability(predictions, calibrations),
        "coverage": draw_coverage(predictions, calibrations),
        "losses": draw_losses(predictions),
    }


def draw_training(
    head: Sequence[Epoch],
    finetune: Sequence[Epoch],
    selected: tuple[int, int],
    line: Sequence[Point] = (),
    alpha: float = 1.0,
) -> Figure:
    """Draw loss and accuracy of both phases on one axis of epochs, with a ring round the epoch `selected` of each.

    Beside them the points of the `line` from start to end of fine-tuning, if there are any; that at `alpha` was kept.
    """
    figure = new_figure(10.5 if line else 8, 6)
    grid = figure.subplots(2, 2 if line else 1, sharex="col", squeeze=False, width_ratios=(2.4, 1) if line else None)
    losses, accuracies = grid[:, 0]
    panels = ((losses, "loss", "train_loss", "val_loss"), (accuracies, "accuracy", "train_accuracy", "accuracy"))
    first = 0
    for phase, look, kept in zip((head, finetune), LOOKS.values(), selected, strict=True):
        ring = [epoch.number for epoch in phase].index(kept)
        for axes, name, training, validation in panels:
            for series, dashes, face in ((training, ":", "white"), (validation, "-", look.color)):
                # A series may lack a value: epoch 0 has no training loss.
                values = [math.nan if (value := getattr(epoch, series)) is None else value for epoch in phase]
                label = f"{look.title}: {'training' if series == training else 'validation'}"
                marker = {"marker": look.marker, "markersize": 5 if len(phase) <= 30 else 3, "markerfacecolor": face}
                axes.plot(range(first, first + len(phase)), values, dashes, color=look.color, label=label, **marker)
            # What lies within the line is no epoch.
            if phase is head or alpha in (0, 1):
                _ring(axes, first + ring, getattr(phase[ring], validation))
            axes.set_ylabel(name)
        first += len(phase)
    for axes in (losses, accuracies):
        axes.set_xlim(-0.6, first - 0.4)
        axes.axvline(len(head) - 0.5, color="black", linewidth=1)
    both = [loss for epoch in (*head, *finetune) for loss in (epoch.train_loss, epoch.val_loss) if loss is not None]
    if 0 < _LOG_RANGE * min(both) < max(both):
        use_log_axis(losses, "y")
    else:
        losses.set_ylim(0, 1.1 * max(both))
    accuracies.margins(y=0.1)
    losses.set_title(f"head phase: epoch {selected[0]} kept ◯")
    losses.set_title("fine-tuning" if 0 < alpha < 1 else f"fine-tuning: epoch {selected[1]} kept ◯", loc="right")
    use_percent(accuracies, "y")
    accuracies.set_xlabel("epoch of the phase")
    # The numbers begin again at the hand-over.
    every = [epoch.number for epoch in (*head, *finetune)]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, len(every)) if step * 20 >= len(every))
    places = [*range(0, len(head), step), *range(len(head), len(every), step)]
    accuracies.set_xticks(places, [str(every[place]) for place in places])
    if line:
        _draw_line(grid[0, 1], grid[1, 1], line, alpha)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_line(losses: Axes, accuracies: Axes, line: Sequence[Point], alpha: float) -> None:
    look = LOOKS["finetuned"]
    for axes, name in ((losses, "val_loss"), (accuracies, "accuracy")):
        known = [point for point in line if math.isfinite(getattr(point, name))]
        values = [getattr(point, name) for point in known]
        axes.plot([point.alpha for point in known], values, color=look.color, marker=look.marker, markersize=5)
        _ring(axes, alpha, next(value for point, value in zip(known, values, strict=True) if point.alpha == alpha))
        axes.margins(x=0.1, y=0.15)
    losses.set_title(f"on the line: {alpha:.0%} kept ◯")
    accuracies.set_xlabel("part of the change kept")
    use_percent(accuracies, "xy")


def _ring(axes: Axes, place: float, height: float) -> None:
    axes.plot(place, height, "o", markersize=15, fillstyle="none", color="black", markeredgewidth=1.3)


def draw_confusion(predictions: Predictions) -> Figure:
    """Draw each checkpoint's confusion matrix: rows are true classes, columns predictions, shades fractions of a row.

    With many classes the most frequent confusions are written out below, and with very many only the 40 are drawn that
    have a part in most mistakes, of whichever checkpoint; a last column has what was taken for any of the others.
    """
    from sklearn.metrics import confusion_matrix

    classes = len(predictions.classes)
    few = classes <= _CLASSES_WITH_NUMBERS
    drawn = _most_mistaken(predictions, _CLASSES_SHOWN)
    note = f"drawn: the {len(drawn)} of {classes:,} classes with most mistakes\n" if len(drawn) < classes else ""
    all_names = short_names(predictions.classes, 22)
    names = [all_names[label] for label in drawn]
    # Room for a line of text a class.
    panel = max(5 if classes <= 3 else 6.2 if few else 7, 2.5 + 0.16 * len(drawn))
    figure = new_figure(1 + max(5, panel - 2) * len(predictions.models), panel)
    panels = figure.subplots(1, len(predictions.models), squeeze=False)[0]
    for axes, (model, probabilities) in zip(panels, predictions.models.items(), strict=True):
        predicted = predicted_labels(probabilities)
        counts = confusion_matrix(predictions.labels, predicted, labels=range(classes))
        totals = counts.sum(axis=1, keepdims=True)
        shown = counts[np.ix_(drawn, drawn)]
        if note:
            shown = np.column_stack([shown, totals[drawn] - shown.sum(axis=1, keepdims=True)])
        empty = np.broadcast_to(totals[drawn] == 0, shown.shape)
        shares = np.ma.masked_array(shown / np.maximum(totals[drawn], 1), mask=empty)
        colors = colormaps["Blues"].with_extremes(bad="#e8e8e8")
        # The root lets single mistakes show beside a full diagonal.
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
            axes.set_xlabel(f"predicted\n\n{note}{_most_confused(predictions, model, all_names)}", size=8)
        columns = names + ["others"] * bool(note)
        letters = 9 if len(names) <= 10 else 6.5
        axes.set_xticks(range(len(columns)), columns, size=letters)
        axes.tick_params("x", rotation=0 if len(names) * max(map(len, names)) <= 48 else 90)
        axes.set_yticks(range(len(names)), names, size=letters)
    bar = figure.colorbar(image, ax=panels, shrink=0.7, aspect=30, label="fraction of the true class's images")
    use_percent(bar.ax, "y")
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    return figure


def _most_mistaken(predictions: Predictions, most: int) -> list[int]:
    """Return, in order, the labels of at most so many classes: those most often mistaken or guessed wrongly."""
    mistakes = np.zeros(len(predictions.classes), dtype=np.int64)
    for model in predictions.models:
        for true, guess, found in find_confused(predictions, model):
            mistakes[[true, guess]] += len(found)
    return sorted(np.argsort(-mistakes, kind="stable")[:most].tolist())


def _most_confused(predictions: Predictions, model: str, names: list[str]) -> str:
    pairs = find_confused(predictions, model)
    if not pairs:
        return f"no mistakes on {plural(len(predictions.labels), 'image')}"
    lines = [f"{len(found):,} of {names[true]} taken for {names[guess]}" for true, guess, found in pairs[:5]]
    return "\n".join(["most frequent mistakes:", *lines])


def draw_curves(predictions: Predictions, scores: dict[str, Scores]) -> Figure | str:
    """Draw ROC and precision-recall of each checkpoint, their areas, as in `scores`, in the legends."""
    counted, names = counted_classes(predictions), short_names(predictions.classes, 30)
    roc, precision_recall = roc_curves(predictions), precision_recall_curves(predictions)
    if roc is None or precision_recall is None:
        return "There are no curves: they need test images of two classes."
    figure = new_figure(10, 6)
    left, right = figure.subplots(1, 2)
    title = f"one class against the rest, mean over {plural(len(counted), 'class', 'classes')} (macro)"
    if len(predictions.classes) == 2:
        title = f"positive: {names[1]}"
    share = float(np.mean([np.mean(predictions.labels == label) for label in counted]))
    for axes, curve, name, area, key in (
        (left, roc, "ROC", "area", "auroc"),
        (right, precision_recall, "Precision-recall", "average precision", "average_precision"),
    ):
        areas = {model: getattr(scores[model], key) for model in predictions.models}
        for model, value in areas.items():
            label = f"{LOOKS[model].title}, {area} {'undefined' if value is None else number(value)}"
            _draw_curve(axes, curve, model, label=label, clip_on=False)
        if all((value or 0) > _ZOOM_FROM for value in areas.values()):
            _enlarge_corner(axes, curve, corner=0.0 if axes is left else 1.0)
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


def _draw_curve(axes: Axes, curve: Curve, model: str, **more: Any) -> None:  # noqa: ANN401 (of matplotlib)
    look = LOOKS[model]
    axes.plot(curve.x, curve.y[model], look.line, color=look.color, linewidth=2.2, zorder=look.layer, **more)


def _enlarge_corner(axes: Axes, curve: Curve, corner: float) -> None:
    """Show a good curve's corner, at x = 0 or 1 and y = 1, once more: all that differs is there."""
    shown = (-0.005, _ZOOM) if corner == 0 else (1 - _ZOOM, 1.005)
    inset = axes.inset_axes((0.3, 0.32, 0.55, 0.55))
    for model in curve.y:
        _draw_curve(inset, curve, model)
    inset.tick_params(labelsize=7)
    inset.set(xticks=np.arange(0, 1.01, 0.05), yticks=np.arange(0, 1.01, 0.05), xlim=shown, ylim=(1 - _ZOOM, 1.005))
    inset.spines[["top", "right"]].set_visible(True)
    axes.indicate_inset_zoom(inset, edgecolor="black")


def draw_runs(kind: str, together: Together) -> Figure:
    """Draw both accuracies of each of several runs, `folds` or `seeds`, and the gain of each with that of all."""
    names = [run.name for run in together.runs]
    figure = new_figure(9, 1.6 + 0.32 * len(names))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    rows = np.arange(len(names))
    heads, finetuned = ([getattr(run, model) for run in together.runs] for model in ("head", "finetuned"))
    left.hlines(rows, heads, finetuned, color=GREY, linewidth=1)
    left.plot(heads, rows, "o", mfc="white", mec="black", label="head phase")
    left.plot(finetuned, rows, "o", color="black", label="fine-tuned")
    left.set(yticks=[*rows, len(names)], yticklabels=[*names, "together"], ylim=(len(names) + 0.6, -0.6))
    left.set_xlabel("accuracy on the test images")
    left.xaxis.set_major_formatter(lambda value, _: percent(value))
    left.locator_params(axis="x", nbins=5)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    right.axvline(0, color=GREY, linewidth=1)
    right.plot([100 * run.gain for run in together.runs], rows, "o", color="black")
    gain = together.gain
    low, middle, high = (100 * value for value in (gain.accuracy_low, gain.accuracy, gain.accuracy_high))
    right.errorbar([middle], [len(names)], xerr=[[middle - low], [high - middle]], fmt="D", color="black", capsize=3)
    right.set(xlabel=f"gain, points; together: {'95% interval' if kind == 'folds' else 'mean and range'}")
    return figure
