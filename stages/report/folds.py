"""What several runs say together, as a page with figures."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from stages.common.format import percent, plural, points, signed
from stages.images.decode import ImageError, decode, read_image
from stages.report.galleries import Sheet, caption
from stages.report.markdown import table
from stages.report.page import tabulate_suspects
from stages.report.style import GREY, house_style, new_figure, shorten, shorten_path
from stages.scores.folds import Together
from stages.scores.suspects import Suspect

_MOST_DRAWN = 20


@house_style()
def draw_runs(kind: str, together: Together) -> Figure:
    """Draw both accuracies of each run as a pair of dots, and the gain of each with that of all."""
    names = [run.name for run in together.runs]
    figure = new_figure(9, 1.6 + 0.32 * len(names))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    rows = np.arange(len(names))
    heads, finetuned = ([getattr(run, model) for run in together.runs] for model in ("head", "finetuned"))
    left.hlines(rows, heads, finetuned, color=GREY, linewidth=1)
    left.plot(heads, rows, "o", mfc="white", mec="black", label="head phase")
    left.plot(finetuned, rows, "o", color="black", label="fine-tuned")
    left.set(
        yticks=[*rows, len(names)],
        yticklabels=[*names, "together"],
        xlabel="accuracy on the test images",
        ylim=(len(names) + 0.6, -0.6),
    )
    left.xaxis.set_major_formatter(lambda value, _: percent(value))
    left.locator_params(axis="x", nbins=5)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    gains = [100 * run.gain for run in together.runs]
    right.axvline(0, color=GREY, linewidth=1)
    right.plot(gains, rows, "o", color="black")
    low, middle, high = (
        100 * value for value in (together.gain.accuracy_low, together.gain.accuracy, together.gain.accuracy_high)
    )
    right.errorbar([middle], [len(names)], xerr=[[middle - low], [high - middle]], fmt="D", color="black", capsize=3)
    right.set(xlabel=f"gain, points; together: {'95% interval' if kind == 'folds' else 'mean and range'}")
    return figure


@house_style()
def draw_suspects(suspects: list[Suspect], root: Path) -> Figure:
    """Draw images whose labels are believed least, from the folder that their paths are relative to."""
    shown = suspects[:_MOST_DRAWN]
    title = f"The {plural(len(shown), 'label')} that the networks believe least"
    sheet = Sheet([(title, "", len(shown))], columns=5, ratio=1, lines=3)
    for axes, one in zip(sheet.cells, shown, strict=True):
        try:
            image = decode(read_image(root / one.path))
            image.thumbnail((400, 400))
            axes.imshow(np.asarray(image))
        except (OSError, ImageError):
            axes.text(0.5, 0.5, "gone", ha="center", va="center", transform=axes.transAxes)
        says = f"{shorten(one.suggestion, 14)}, {percent(one.suggestion_probability)}"
        caption(axes, f"label: {shorten(one.label, 18)}", f"suggested: {says}", shorten_path(one.path, 26))
    return sheet.figure


def compose_page(kind: str, together: Together, summary: str, wrong: float | None, suspects: list[Suspect]) -> str:
    """Return the page, as Markdown."""
    verdict = summary.splitlines()[-1]
    methods = {
        "folds": "Each image was tested once, by networks that were not trained on it. Folds share most of their "
        "training images, so their gains vary less than those of independent trainings: both intervals of the gain "
        "are at least as wide as [Nadeau and Bengio's](https://doi.org/10.1023/A:1024068626366), which allows for "
        "that, and as those that take all images for one test. A verdict asks for an interval without 0, that on "
        "accuracy for McNemar's p below 0.05, too.",
        "seeds": "One split, several trainings: mean and range show what the chance of training does to the gain. The "
        "choice of test images is not in them, so there is no verdict.",
    }
    rows = [
        [run.name, f"{run.images:,}", percent(run.head), percent(run.finetuned), points(run.gain),
         signed(run.loss), f"{run.fixed:,}", f"{run.broken:,}"]
        for run in together.runs
    ]  # fmt: skip
    header = ["run", "test images", "head phase", "fine-tuned", "gain", "gain, log-loss", "fixed", "broken"]
    parts = ["# Did fine-tuning help, over all runs?", f"**{verdict}**", table(header, rows), methods[kind]]
    parts.append("![Accuracy and gain of each run](gain.png)")
    if wrong is not None:
        parts += [
            "## Labels that may be wrong",
            f"About {wrong:.0f} of {together.images:,}, by [confident learning](https://arxiv.org/abs/1911.00068) on "
            "the fine-tuned networks' probabilities. The images whose label is believed least come first: look at "
            "them, for a mistake of the network ranks as high as one of the label.",
        ]
    if suspects:
        parts += ["![Labels that are believed least](suspects.png)", tabulate_suspects(suspects)]
    return "\n\n".join(parts) + "\n"
