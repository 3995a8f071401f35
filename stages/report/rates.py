"""The figure of the rate finder."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from stages.report.style import GREY, LOOKS, house_style, new_figure
from stages.training.rate_finder import Sweep, Valley

# From this ratio of largest to smallest loss on, the axis is logarithmic.
_LOG_RANGE = 30
_LOOKS = {"train_head": LOOKS["head"], "finetune": LOOKS["finetuned"]}


@house_style()
def draw_rates(sweep: Sweep, found: Valley | None, phase: str, now: float) -> Figure:
    """Draw the loss over the learning rate, the stretch in which it falls, the suggestion, and the rate set now.

    Args:
        sweep: what was seen.
        found: the valley in it, if there is one.
        phase: `train_head` or `finetune`.
        now: the phase's `lr`.
    """
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    color = _LOOKS[phase].color
    rates, raw, losses = (np.array(values) for values in (sweep.rates, sweep.raw, sweep.losses))
    axes.plot(rates, raw, ".", color=color, alpha=0.35, markersize=5, label="one batch")
    axes.plot(rates, losses, color=color, linewidth=2.2, label="smoothed")
    axes.axvline(now, color=GREY, linestyle=":", linewidth=1.5, label=f"{phase}.lr now, {now:g}")
    if found is None:
        title = "No suggestion: no rate lowers the loss"
    else:
        title = f"Suggestion: {phase}.lr={found.suggestion:.1e}"
        axes.axvspan(found.first, found.last, color=color, alpha=0.12, linewidth=0, label="it falls")
        axes.axvline(found.suggestion, color="black", linewidth=1.5, label=f"suggestion, {found.suggestion:.1e}")
    if sweep.exploded:
        title += f"; the loss explodes at {sweep.rates[-1]:.1e}"
    axes.set(xlabel="learning rate of the head", ylabel="training loss, nats", xscale="log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(title)
    # The explosion itself leaves the picture: it may be a thousand times as high as all before.
    shown = sweep.losses[:-1] if sweep.exploded else sweep.losses
    if max(shown) > _LOG_RANGE * min(shown) > 0:
        axes.set(yscale="log", ylim=(min(shown) / 2, max(shown) * 2))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        # So do single batches far above the curve.
        axes.set_ylim(0, 1.5 * max(shown))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure
