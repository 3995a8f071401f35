"""A network on trial: the out-of-fold score of a head on its frozen features, its speed and size."""

import time
from dataclasses import dataclass
from functools import partial
from math import nan

import numpy as np
import torch
from matplotlib.figure import Figure

from stages.common.format import number, percent, percent_range
from stages.common.params import Params
from stages.images.index import number_groups
from stages.network.network import cut
from stages.network.objective import probabilities, weigh_classes
from stages.network.weights import build_initial
from stages.report.style import GREY, LOOKS, new_figure, use_log_axis, use_percent
from stages.scores.evaluation import align
from stages.scores.metrics import score
from stages.training.batches import READ_AT_ONCE, read_all
from stages.training.features import BATCH, FrozenPrefix, keep
from stages.training.phase import Entries, open_prefix
from stages.training.search import find_head


@dataclass(frozen=True)
class Tried:
    """A network, with the out-of-fold score of the head found on its features, or the `problem` with it.

    `accuracy` with its 95% interval; `loss`: log-loss; `images_per_second`: of its backbone, on this machine, decoding
    aside; `megabytes`: of its tensors; `unfreeze`: how many blocks fine-tuning would train.
    """

    network: str
    weights: str
    accuracy: float = nan
    accuracy_low: float = nan
    accuracy_high: float = nan
    loss: float = nan
    images_per_second: float = nan
    megabytes: float = nan
    unfreeze: int = 0
    problem: str = ""


def with_network(params: Params, arch: str, weights: str) -> Params:
    """Return the parameters with another network and a head search."""
    model = {"arch": arch, "weights": None if weights == "null" else weights, "head": "pooled"}
    update = {
        "model": params.model.model_copy(update=model),
        "train_head": params.train_head.model_copy(update={"search": True, "augment": "none"}),
    }
    return params.model_copy(update=update)


def try_network(params: Params, entries: Entries, device: torch.device) -> Tried:
    """Store a network's features, find its head, and measure both; raises StageError if the network cannot be made."""
    network, description, _ = build_initial(params, entries.train)
    blocks, _ = cut(network.to(device), unfreeze=0)
    prefix = open_prefix(blocks, description, device, params)
    every = [*entries.train, *entries.watched]
    kept = keep(prefix, {len(blocks): every}, params.cache.max_gigabytes)[len(blocks)]
    weights = weigh_classes(params.class_weights, entries.train)
    read = partial(read_all, prefix, kept=kept, batch_size=READ_AT_ONCE, title="features")
    found = find_head(read, entries, params.model.hidden, params.train_head, weights, params.seed, device)
    values = probabilities(found.logits.double(), found.temperature).numpy()
    labels = np.array([entry.label for entry in found.entries])
    scores = score(labels, values, number_groups(found.entries))
    return Tried(
        params.model.arch,
        params.model.weights or "null",
        *(scores.accuracy, scores.accuracy_low, scores.accuracy_high, scores.loss),
        round(measure_speed(prefix), 1),
        round(sum(tensor.nbytes for tensor in network.state_dict().values()) / 1e6, 1),
        min(params.finetune.unfreeze, len(network.backbone)),
    )


def measure_speed(prefix: FrozenPrefix) -> float:
    """Return the backbone's speed, images per second, without reading images."""
    crop = prefix.preprocessing.crop
    images = torch.zeros(BATCH, 3, crop, crop)
    prefix.forward(images)[0].cpu()
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < 1 or count < 3:
        prefix.forward(images)[0].cpu()
        count += 1
    return count * BATCH / seconds


def list_backbones(tried: list[Tried]) -> list[str]:
    """Return the lines of a table, in the given order, followed by the networks with problems."""
    rows = [["   network", "accuracy", "95% interval", "log-loss", "images/s", "MB"]]
    for place, one in enumerate((one for one in tried if not one.problem), start=1):
        interval = percent_range(one.accuracy_low, one.accuracy_high)
        speed, size = f"{one.images_per_second:,.0f}", f"{one.megabytes:,.0f}"
        rows.append([f"{place:<2} {one.network}", percent(one.accuracy), interval, number(one.loss), speed, size])
    return [*align(rows), *(f"{one.network}: {one.problem}" for one in tried if one.problem)]


def draw_backbones(tried: list[Tried]) -> Figure:
    """Draw accuracy with its interval against speed, each network by its number in the table."""
    figure = new_figure(9, 4.6)
    axes = figure.add_subplot()
    blue = LOOKS["finetuned"].color
    for place, one in enumerate(tried, start=1):
        spot = (one.images_per_second, one.accuracy)
        reach = [[one.accuracy - one.accuracy_low], [one.accuracy_high - one.accuracy]]
        axes.errorbar(*spot, reach, fmt="o", markersize=13, color=blue, ecolor=GREY, elinewidth=1)
        axes.plot([], [], " ", label=f"{place}  {one.network}, {percent(one.accuracy)}")
        axes.annotate(f"{place}", spot, ha="center", va="center", color="white", size=8)
    use_log_axis(axes, "x")
    axes.set_xlabel("images a second, backbone alone, on this machine")
    axes.set_ylabel("accuracy of the head found, out-of-fold")
    use_percent(axes, "y")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=0, handletextpad=0)
    return figure
