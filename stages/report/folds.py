"""What several runs say together, as a page with figures."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from stages.common.words import percent, plural, points
from stages.pictures.decode import PictureError, decode, read_picture
from stages.report.galleries import Sheet, caption, say
from stages.report.markdown import table
from stages.report.page import tabulate_suspects
from stages.report.style import GREY, house_style, new_figure, shorten
from stages.scores.folds import Together
from stages.scores.suspects import Suspect

_MOST_DRAWN = 20


@house_style()
def draw_runs(together: Together) -> Figure:
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
        xlabel="accuracy on the test pictures",
        ylim=(len(names) + 0.6, -0.6),
    )
    left.xaxis.set_major_formatter(lambda value, _: percent(value))
    left.locator_params(axis="x", nbins=5)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    gains = [100 * run.gain for run in together.runs]
    right.axvline(0, color=GREY, linewidth=1)
    right.plot(gains, rows, "o", color="black")
    last, middle = len(names), 100 * together.gain
    margins = [[middle - 100 * together.gain_low], [100 * together.gain_high - middle]]
    right.errorbar([middle], [last], xerr=margins, fmt="D", color="black", capsize=3)
    right.set(xlabel="gain, points; together with 95% interval")
    return figure


@house_style()
def draw_suspects(suspects: list[Suspect], root: Path) -> Figure:
    """Draw the pictures whose labels are believed least.

    Args:
        suspects: the least believed first.
        root: the folder that their paths are relative to.
    """
    if not suspects:
        return say("Of no picture is another class more probable than its label.")
    shown = suspects[:_MOST_DRAWN]
    title = f"Labels that are believed least: {len(shown)} of {plural(len(suspects), 'picture')}"
    sheet = Sheet([(title, "", len(shown))], columns=5, ratio=1, lines=3)
    for axes, one in zip(sheet.cells, shown, strict=True):
        try:
            picture = decode(read_picture(root / one.path))
            picture.thumbnail((400, 400))
            axes.imshow(np.asarray(picture))
        except (OSError, PictureError):
            axes.text(0.5, 0.5, "gone", ha="center", va="center", transform=axes.transAxes)
        says = f"{shorten(one.suggestion, 14)}, {percent(one.suggestion_probability)}"
        caption(axes, f"label: {shorten(one.label, 18)}", f"rather {says}", shorten(one.path, 26))
    return sheet.figure


def compose_page(kind: str, together: Together, summary: str, wrong: float | None, suspects: list[Suspect]) -> str:
    """Return the page, as Markdown.

    Args:
        kind: `folds` or `seeds`.
        together: of all runs.
        summary: its description.
        wrong: the number of labels that are probably wrong, `None` where that was not looked for.
        suspects: the pictures with such labels, the least believed first.
    """
    verdict = summary.splitlines()[-1]
    methods = {
        "folds": "Each picture was tested once, by networks that were not trained on it. Folds share most of their "
        "training pictures, so their gains vary less than chance alone would have it: the interval of the gain is "
        "[Nadeau and Bengio's](https://doi.org/10.1023/A:1024068626366), which allows for that, and at least as wide "
        "as the one that takes all pictures for one test. The verdict asks for an interval without 0 and for "
        "McNemar's p below 0.05.",
        "seeds": "One split, several trainings. The interval is of the mean over seeds: what the chance of training "
        "makes of the gain. The choice of test pictures is not in it.",
    }
    rows = [
        [run.name, f"{run.pictures:,}", percent(run.head), percent(run.finetuned), points(run.gain),
         f"{run.fixed:,}", f"{run.broken:,}"]
        for run in together.runs
    ]  # fmt: skip
    header = ["run", "test pictures", "head phase", "fine-tuned", "gain", "fixed", "broken"]
    parts = ["# Did fine-tuning help, over all runs?", f"**{verdict}**", table(header, rows), methods[kind]]
    parts.append("![Accuracy and gain of each run](gain.png)")
    if wrong is not None:
        parts += [
            "## Labels that may be wrong",
            f"About {wrong:.0f} of {together.pictures:,}, by [confident learning](https://arxiv.org/abs/1911.00068) on "
            "the fine-tuned networks' probabilities. The pictures whose label is believed least come first: look at "
            "them, for a mistake of the network ranks as high as one of the label.",
            "![Labels that are believed least](suspects.png)",
            tabulate_suspects(suspects, "suspects.csv"),
        ]
    return "\n\n".join(parts) + "\n"
