"""Which network? For each, the head that is found on its frozen features, by folds; how fast it is, and how large."""

import argparse
import shlex
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from stages.common.cli import StageError, run
from stages.common.device import resolve_device
from stages.common.machine import reuse_freed_memory
from stages.common.params import Params, load_params
from stages.common.records import write_table
from stages.images.index import number_groups
from stages.network.initial import build_initial
from stages.network.network import cut
from stages.network.objective import probabilities, weigh_classes
from stages.report.backbones import Tried, draw_backbones, list_backbones
from stages.report.style import save_figure
from stages.scores.metrics import score
from stages.training.batches import READ_AT_ONCE, read_all
from stages.training.features import BATCH, FrozenPrefix, keep
from stages.training.phase import Entries, keep_features, open_prefix, read_entries
from stages.training.search import find_head

# By size.
DOZEN = (
    *("shufflenet_v2_x1_0", "mobilenet_v3_small", "mobilenet_v2", "efficientnet_b0", "mobilenet_v3_large"),
    *("regnet_y_800mf", "densenet121", "resnet18", "resnet50", "swin_t", "convnext_tiny", "vit_b_16"),
)


def main() -> None:
    """Try the networks one after the other, and say which experiments to run."""
    parser = argparse.ArgumentParser(prog="python -m stages.backbones", description=__doc__)
    parser.add_argument(
        "networks",
        nargs="*",
        metavar="ARCH[=WEIGHTS]",
        help="torchvision classifiers and their weights: a name, a file or null; by default a dozen, and DEFAULT",
    )
    parser.add_argument("--output", type=Path, default=Path("backbones.csv"), help="and .png")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--index", type=Path, default=Path("data/index"))
    arguments = parser.parse_args()
    if arguments.output.suffix.lower() != ".csv" or not arguments.output.parent.is_dir():
        raise StageError(f"--output: {arguments.output} should end in .csv, in a folder that is there")
    params, entries = load_params(arguments.params), read_entries(arguments.index)
    device = resolve_device(params.device)
    reuse_freed_memory()
    tried: list[Tried] = []
    wanted = dict.fromkeys(arguments.networks or DOZEN)
    for number, network in enumerate(tqdm(wanted, desc="networks", unit="network", disable=None), start=1):
        arch, _, weights = network.partition("=")
        print(f"{arch} ({number} of {len(wanted)})", flush=True)
        known = params.model.weights or "null"
        own = with_network(params, arch, weights or (known if arch == params.model.arch else "DEFAULT"))
        try:
            tried.append(try_network(own, entries, device))
        except StageError as error:
            tried.append(Tried(arch, own.model.weights or "null", problem=str(error)))
        # After each: whoever stops it keeps what is there.
        write_table(arguments.output, Tried, tried)
    done = sorted((one for one in tried if not one.problem), key=lambda one: (-one.accuracy, one.loss))
    print("\n".join(list_backbones([*done, *(one for one in tried if one.problem)])))
    if not done:
        raise StageError("no network could be tried; the table says why")
    figure = arguments.output.with_suffix(".png")
    save_figure(figure, draw_backbones(done))
    print(f"written: {arguments.output}, {figure}")
    best = done[0]
    fastest = max((one for one in done if one.accuracy >= best.accuracy_low), key=lambda one: one.images_per_second)
    chosen = [("the best", best), ("the fastest within its interval", fastest)]
    for title, one in chosen[: 1 + (fastest is not best)]:
        own = with_network(params, one.network, one.weights)
        own = own.model_copy(update={"finetune": own.finetune.model_copy(update={"unfreeze": one.unfreeze})})
        keep_features(*build_initial(own, entries.train)[:2], entries, device, own)
        print(f"{title}: dvc exp run {say_settings(params, own)}")


def with_network(params: Params, arch: str, weights: str) -> Params:
    """Return the parameters with another network, whose head is found."""
    model = {"arch": arch, "weights": None if weights == "null" else weights, "head": "pooled"}
    update = {
        "model": params.model.model_copy(update=model),
        "train_head": params.train_head.model_copy(update={"search": True, "augment": "none"}),
    }
    return params.model_copy(update=update)


def try_network(params: Params, entries: Entries, device: torch.device) -> Tried:
    """Keep a network's features, find its head, and measure it; raises a `StageError` where it cannot be made."""
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
        scores.accuracy,
        scores.accuracy_low,
        scores.accuracy_high,
        scores.loss,
        round(measure_speed(prefix), 1),
        round(sum(tensor.nbytes for tensor in network.state_dict().values()) / 1e6, 1),
        min(params.finetune.unfreeze, len(network.backbone)),
    )


def measure_speed(prefix: FrozenPrefix) -> float:
    """Return how many images a second the backbone takes, without reading them."""
    crop = prefix.preprocessing.crop
    images = torch.zeros(BATCH, 3, crop, crop)
    prefix.forward(images)[0].cpu()
    started, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < 1 or count < 3:
        prefix.forward(images)[0].cpu()
        count += 1
    return count * BATCH / seconds


def say_settings(params: Params, own: Params) -> str:
    """Return the options of `dvc exp run` that lead from one set of parameters to the other."""
    options = []
    for section in ("model", "train_head", "finetune"):
        before, after = getattr(params, section).model_dump(), getattr(own, section).model_dump()
        options += [
            f"{section}.{key}={'null' if value is None else str(value).lower() if value is True else value}"
            for key, value in after.items()
            if value != before[key]
        ]
    return " ".join(f"-S {shlex.quote(option)}" for option in options) or "(as params.yaml is)"


if __name__ == "__main__":
    run(main)
