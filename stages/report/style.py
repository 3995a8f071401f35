"""Shared by all figures: colours, fonts, axes, saving. No display is needed."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from stages.common.files import write_bytes

DPI = 150
GREY = "#595959"

_FONT = "DejaVu Sans"  # part of matplotlib, so figures look the same everywhere


# Whatever the user's own matplotlibrc says.
matplotlib.rcdefaults()
matplotlib.rcParams.update(
    {
        "font.family": _FONT,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.35,
        "legend.frameon": False,
        # A class may be called "$5_bills$".
        "text.parse_math": False,
    }
)


@dataclass(frozen=True)
class Look:
    """The style of a checkpoint: not only colours differ, but also lightness, dashes and markers."""

    title: str
    color: str
    line: str
    marker: str
    marker_size: float
    layer: float  # dashed lines above full ones, which would hide them


# Okabe and Ito's colours, told apart by colour-blind readers (https://jfly.uni-koeln.de/color/).
LOOKS = {
    "head": Look("head phase", "#E69F00", "--", "o", 9, 3),
    "finetuned": Look("fine-tuned", "#0072B2", "-", "s", 6, 2.5),
}


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Return an empty figure; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Write a PNG of 150 dpi without empty margins, whole or not at all; the same figure gives the same bytes."""
    content = io.BytesIO()
    # Without a layout engine all positions are fixed.
    box = "tight" if figure.get_layout_engine() else None
    figure.savefig(content, format="png", bbox_inches=box, pad_inches=0.12, metadata={"Software": None})
    write_bytes(path, content.getvalue())


def shorten(text: str, length: int) -> str:
    """Return at most `length` characters: start and end, since names may differ at either. Undrawable ones are `�`."""
    drawn = _drawn(text)
    if len(drawn) <= length:
        return drawn
    end = (length - 1) // 2
    return f"{drawn[: length - 1 - end]}…{drawn[len(drawn) - end :]}"


def shorten_path(path: str, length: int) -> str:
    """Return a file's name without its folders; of a longer one the end, which is what tells files apart."""
    name = _drawn(path.rpartition("/")[2])
    return name if len(name) <= length else f"…{name[1 - length :]}"


def short_names(names: Sequence[str], length: int) -> list[str]:
    """Shorten class names; those that the font cannot draw, or that would be the same, get their label in front."""
    short = [shorten(name, length) for name in names]
    return [
        f"{label} {shorten(name, length - 1 - len(str(label)))}" if "\ufffd" in text or short.count(text) > 1 else text
        for label, (name, text) in enumerate(zip(names, short, strict=True))
    ]


def wrap(text: str, width: float, size: float = 9) -> str:
    """Break text into lines of at most `width` inches, about, at a font of `size` points."""
    return "\n".join(textwrap.fill(line, int(width * 72 / (0.53 * size))) for line in text.splitlines())


def use_percent(axes: Axes, which: str) -> None:
    """Format the numbers of an axis, `x`, `y` or both, `xy`, as percent."""
    for letter in which:
        getattr(axes, f"{letter}axis").set_major_formatter(PercentFormatter(xmax=1))


def count_on_log_axis(axes: Axes, most: float) -> None:
    """Use a logarithmic axis from 0, on which one image is visible beside a thousand."""
    axes.set(yscale="symlog", ylim=(0, most))
    axes.yaxis.set_major_locator(FixedLocator([0, *10.0 ** np.arange(np.floor(np.log10(most)) + 1)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def use_log_axis(axes: Axes, which: str) -> None:
    """Use a logarithmic axis with plain numbers: matplotlib's powers of ten need math text, which is off."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    # A short axis may contain only one power of ten.
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,), numticks=10))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _drawn(text: str) -> str:
    return "".join(character if ord(character) in _drawable() else "\ufffd" for character in text)


@cache
def _drawable() -> frozenset[int]:
    return frozenset(get_font(findfont(_FONT)).get_charmap())
