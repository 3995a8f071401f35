"""What was tried of several networks: a table, and a figure of accuracy against speed."""

import math
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from stages.common.format import number, percent, percent_range
from stages.report.style import GREY, house_style, new_figure, use_log_axis


@dataclass(frozen=True)
class Tried:
    """A network, and what the head that was found on its features is worth out-of-fold; or the `problem` with it.

    `accuracy` with its 95% interval; `loss`: log-loss; `images_per_second`: of its backbone, on this machine, decoding
    aside; `megabytes`: of its tensors; `unfreeze`: how many blocks fine-tuning would train.
    """

    network: str
    weights: str
    accuracy: float = math.nan
    accuracy_low: float = math.nan
    accuracy_high: float = math.nan
    loss: float = math.nan
    images_per_second: float = math.nan
    megabytes: float = math.nan
    unfreeze: int = 0
    problem: str = ""


def list_backbones(tried: list[Tried]) -> list[str]:
    """Return the lines of a table, in the order given; below it, what was wrong with those that could not be tried."""
    rows = [["", "network", "accuracy", "95% interval", "log-loss", "images/s", "MB"]]
    done = [one for one in tried if not one.problem]
    for place, one in enumerate(done, start=1):
        interval = percent_range(one.accuracy_low, one.accuracy_high)
        speed, size = f"{one.images_per_second:,.0f}", f"{one.megabytes:,.0f}"
        rows.append([f"{place}", one.network, percent(one.accuracy), interval, number(one.loss), speed, size])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        lines.append("  ".join([*left, *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))]))
    return [*lines, *(f"{one.network}: {one.problem}" for one in tried if one.problem)]


@house_style()
def draw_backbones(tried: list[Tried]) -> Figure:
    """Draw accuracy with its interval against speed, each network by its number in the table."""
    figure = new_figure(9, 4.6)
    axes = figure.add_subplot()
    for place, one in enumerate(tried, start=1):
        below, above = one.accuracy - one.accuracy_low, one.accuracy_high - one.accuracy
        axes.errorbar(
            one.images_per_second,
            one.accuracy,
            [[below], [above]],
            fmt="o",
            markersize=13,
            color="#0072B2",
            ecolor=GREY,
            elinewidth=1,
        )
        axes.plot([], [], " ", label=f"{place}  {one.network}, {percent(one.accuracy)}")
        axes.annotate(
            f"{place}", (one.images_per_second, one.accuracy), ha="center", va="center", color="white", size=8
        )
    use_log_axis(axes, "x")
    axes.set(
        xlabel="images a second, backbone alone, on this machine", ylabel="accuracy of the head found, out-of-fold"
    )
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=0, handletextpad=0)
    return figure
