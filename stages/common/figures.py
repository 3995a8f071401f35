"""The figures, drawn without a display."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from stages.common.epoch import Epoch
from stages.common.files import write_bytes

# Okabe and Ito's colours, told apart by colour-blind readers (https://jfly.uni-koeln.de/color/).
BLUE, ORANGE = "#0072B2", "#D55E00"


def draw_loss(head: Sequence[Epoch], finetune: Sequence[Epoch]) -> Figure:
    """Draw the training and the validation loss of both phases over the epochs."""
    figure, axes = _draw("loss", head, finetune, lambda epoch: (epoch.train_loss, epoch.val_loss))
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def draw_accuracy(head: Sequence[Epoch], finetune: Sequence[Epoch]) -> Figure:
    """Draw the accuracy on the training and on the validation pictures of both phases over the epochs."""
    figure, axes = _draw("accuracy", head, finetune, lambda epoch: (epoch.train_accuracy, epoch.accuracy))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(loc="lower right")
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Write a PNG of 150 dpi, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_bytes(path, content.getvalue())


def _draw(
    title: str, head: Sequence[Epoch], finetune: Sequence[Epoch], values: Callable[[Epoch], tuple[float, float]]
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    epochs = range(1, len(head) + len(finetune) + 1)
    training, validation = zip(*map(values, (*head, *finetune)), strict=True)
    axes.plot(epochs, training, "o--", color=BLUE, label="training")
    axes.plot(epochs, validation, "s-", color=ORANGE, label="validation")
    axes.set(xlabel="epoch", ylabel=title, xlim=(0.5, len(epochs) + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    hand_over = len(head) + 0.5
    axes.axvline(hand_over, color="black", linewidth=1, linestyle=":")
    for label, side, offset in (("head phase", "right", -6), ("fine-tuning", "left", 6)):
        axes.annotate(label, (hand_over, 1), (offset, 4), axes.get_xaxis_transform(), "offset points", ha=side)
    return figure, axes
