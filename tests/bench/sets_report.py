"""What `sets.py` prints and draws of its results."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.ticker import PercentFormatter

from stages.common.format import cell, plural, points, signed, table
from stages.report import style
from stages.report.style import Look

# In the order of the columns; these colours are Okabe and Ito's, too.
LOOKS = {
    "tutorial": Look("tutorial's loop", "#000000", "", "D", 5, 1),
    "fastai": Look("fastai", "#56B4E9", "", "s", 5, 1),
    "sklearn": Look("scikit-learn", "#009E73", "", "^", 6, 2),
    "sklearn, train+val": Look("scikit-learn, train + val", "#CC79A7", "", "v", 10, 1),
    **style.LOOKS,
}
# Title, factor and format.
COLUMNS = {
    "accuracy": ("accuracy, %", 100, ".2f"),
    "loss": ("log-loss", 1, ".4f"),
    "ece": ("calibration error, %", 100, ".2f"),
    "seconds": ("seconds", 1, ".1f"),
}


@dataclass(frozen=True)
class Result:
    """A row of `sets.csv`: what a method reached on a set's test images, and what it was made from and with.

    `verdict` and `loss_verdict` are the pipeline's on fine-tuning; `train`, `val` and `test` are numbers of images.
    """

    set: str
    seed: int
    method: str
    accuracy: float
    loss: float
    ece: float
    seconds: float
    train: int
    val: int
    test: int
    arch: str
    weights: str
    image_size: int
    commit: str
    verdict: str | None = None
    loss_verdict: str | None = None


def tabulate(results: list[Result]) -> Iterator[str]:
    """Yield a table of each measure, a row a set, and what fine-tuning changed."""
    first, seeds = results[0], sorted({result.seed for result in results})
    commits = ", ".join(sorted({result.commit for result in results}))
    intervals = ", in parentheses the lowest and the highest" * (len(seeds) > 1)
    yield (
        f"{first.arch}, {first.weights}, {first.image_size} px, commit {commits}, {os.cpu_count()} CPU cores. Means of "
        f"{plural(len(seeds), 'seed')}{intervals}; behind a set's name its numbers of images to train on, to validate "
        f"and to test, of seed {first.seed}."
    )
    named = {one.set: f"{cell(one.set)} ({one.train:,} + {one.val:,} + {one.test:,})" for one in reversed(results)}
    looks = {method: look for method, look in LOOKS.items() if any(one.method == method for one in results)}
    for measure, (title, factor, form) in COLUMNS.items():
        rows: list[list[str]] = []
        means: dict[str, list[float]] = {method: [] for method in looks}
        for name in sorted(named):
            rows.append([named[name]])
            for method in looks:
                values = [factor * getattr(one, measure) for one in results if (one.set, one.method) == (name, method)]
                means[method] += [fmean(values)] if values else []
                between = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
                rows[-1].append(f"{fmean(values):{form}}{between}" if values else "")
        # Of all sets or of none: the sets are not equally hard.
        of_sets = (f"{fmean(own):{form}}" if len(own) == len(rows) else "" for own in means.values())
        yield ""
        yield table([title, *(look.title for look in looks.values())], [*rows, ["mean of the sets", *of_sets]])
    if "head" in looks:
        yield ""
        yield describe_gains(results)


def describe_gains(results: list[Result]) -> str:
    """Say what fine-tuning changed, in all runs together."""
    head, finetuned = (
        {(one.set, one.seed): one for one in results if one.method == method} for method in ("head", "finetuned")
    )
    pairs = [(before, finetuned[run]) for run, before in head.items()]
    losses = [after.loss - before.loss for before, after in pairs]
    worse = [sum(getattr(after, name) == "worse" for _, after in pairs) for name in ("verdict", "loss_verdict")]
    return (
        f"Fine-tuned minus head, mean of {plural(len(pairs), 'run')}: accuracy "
        f"{points(fmean(after.accuracy - before.accuracy for before, after in pairs))}, log-loss "
        f"{signed(fmean(losses))}. Log-loss is lower in {sum(loss < 0 for loss in losses)} of them. Verdicts `worse`: "
        f"{worse[0]} on accuracy, {worse[1]} on probabilities."
    )


def draw(path: Path, results: list[Result]) -> None:
    """Draw accuracy against seconds, a panel a set: means over the seeds, with bars from the lowest to the highest."""
    sets = sorted({result.set for result in results})
    columns = min(len(sets), 4)
    figure = style.new_figure(0.6 + 2.6 * max(columns, 2), 0.9 + 2.3 * math.ceil(len(sets) / columns))
    panels = figure.subplots(-(-len(sets) // columns), columns, sharex=True, squeeze=False).flatten()
    for axes, name in zip(panels, sets, strict=False):
        for method, look in LOOKS.items():
            own = [result for result in results if (result.set, result.method) == (name, method)]
            values = [result.accuracy for result in own]
            if not values:
                continue
            mean, hollow = fmean(values), method == "sklearn, train+val"
            # Both regressions take the same time: one may lie on the other.
            axes.errorbar(
                fmean(result.seconds for result in own),
                mean,
                [[mean - min(values)], [max(values) - mean]],
                fmt=look.marker,
                color=look.color,
                markersize=look.marker_size,
                markerfacecolor="none" if hollow else look.color,
                elinewidth=3 if hollow else 1.5,
                zorder=look.layer,
                label=look.title,
            )
        low, high = axes.get_ylim()
        # Room for half a marker above 100%, not for a tick.
        axes.set_ylim(low, min(high, 1 + 0.05 * (1 - low)))
        axes.set_title(style.shorten(name, 30))
        axes.set_xlabel("seconds")
        axes.tick_params(labelbottom=True)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        style.use_log_axis(axes, "x")
    for axes in panels[len(sets) :]:
        axes.set_axis_off()
    drawn = [panel.get_legend_handles_labels() for panel in panels]
    labelled = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=3)
    figure.supylabel("test accuracy", fontsize=9)
    style.save_figure(path, figure)
