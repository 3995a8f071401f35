"""What labelling the suggested images first is worth: test accuracy against the number of labelled images.

Each PROJECT is a folder in which `split` and `build_model` have run. Its training and validation images count as
unlabelled. A first few are drawn at random and labelled, as in the index; then more, as `stages.suggest` ranks them, or
at random; each time, the head is found on the kept features of those that are labelled, and tested. Prints a line for
each, and draws means over the seeds, with the range.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, PercentFormatter
from torch import nn

from stages.common.device import resolve_device
from stages.common.params import load_params
from stages.deploy.suggestions import Pool, choose
from stages.images.index import read_index
from stages.network.checkpoint import load_checkpoint
from stages.network.network import cut, set_trainable
from stages.network.objective import probabilities
from stages.report.style import new_figure, save_figure
from stages.training.batches import READ_AT_ONCE, read_all
from stages.training.features import keep
from stages.training.phase import Entries, open_prefix
from stages.training.reference import Features
from stages.training.search import find_head

RANKINGS = {"suggested": ("#0072B2", "-", "s"), "random": ("#E69F00", "--", "o")}


def simulate(project: Path, numbers: list[int], seeds: list[int]) -> dict[str, np.ndarray]:
    """Return the test accuracies of each ranking, (seeds, numbers)."""
    os.chdir(project)
    params = load_params(Path("params.yaml"))
    device = resolve_device(params.device)
    parts = {part: read_index(Path("data/index") / f"{part}.csv") for part in ("train", "val", "test")}
    pool, test = [*parts["train"], *parts["val"]], parts["test"]
    network, description = load_checkpoint(Path("data/checkpoints/initial.safetensors"))
    set_trainable(network, 0)
    blocks, _ = cut(network.to(device), 0)
    prefix, end = open_prefix(blocks, description, device, params), len(blocks)
    kept = keep(prefix, {end: [*pool, *test]}, params.cache.max_gigabytes)[end]
    read = partial(read_all, prefix, kept=kept, batch_size=READ_AT_ONCE, title="features")
    pooled = torch.cat(list(read(pool))).flatten(1)
    directions = Features()(pooled).numpy()
    results = {name: np.empty((len(seeds), len(numbers))) for name in RANKINGS}
    for row, seed in enumerate(seeds):
        for name, accuracies in results.items():
            random = np.random.default_rng(seed)
            labelled = random.permutation(len(pool))[: numbers[0]].tolist()
            for column, number in enumerate(numbers):
                # The test images are only scored: the head is the last one of its training, not the best one.
                entries = Entries([pool[place] for place in labelled], test, watches_test=True)
                found = find_head(read, entries, params.model.hidden, params.train_head, None, seed, device)
                accuracies[row, column] = found.epochs[-1].accuracy
                print(
                    f"{project.name}, seed {seed}, {name}: {number} labelled, {accuracies[row, column]:.2%}", flush=True
                )
                if number == numbers[-1]:
                    break
                others = np.setdiff1d(np.arange(len(pool)), labelled)
                if name == "random":
                    chosen = random.permutation(len(others))
                else:
                    with torch.no_grad():
                        logits = nn.Sequential(*found.layers)(pooled[others]).double()
                    values = probabilities(logits, found.temperature).float().numpy()
                    candidates = Pool(np.empty(len(others), object), values, directions[others], values[:, 0])
                    chosen = np.array(choose(candidates, directions[labelled], numbers[column + 1] - number))
                labelled += others[chosen[: numbers[column + 1] - number]].tolist()
    return results


def draw(axes: Axes, title: str, numbers: list[int], results: dict[str, np.ndarray]) -> None:
    """Draw means and ranges over the seeds."""
    for name, accuracies in results.items():
        color, line, marker = RANKINGS[name]
        axes.plot(numbers, accuracies.mean(axis=0), color=color, linestyle=line, marker=marker, label=name)
        axes.fill_between(numbers, accuracies.min(axis=0), accuracies.max(axis=0), color=color, alpha=0.15, linewidth=0)
    axes.set(title=title, xscale="log", xlabel="labelled images", xticks=numbers, xticklabels=numbers)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def main() -> None:
    """Simulate in each project, and draw a panel for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("projects", type=Path, nargs="+")
    parser.add_argument("--numbers", type=int, nargs="+", default=[20, 40, 80, 160, 320])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--output", type=Path, default=Path("labelling.png"))
    arguments = parser.parse_args()
    projects, output = [path.resolve() for path in arguments.projects], arguments.output.resolve()
    figure = new_figure(4 * len(projects), 3.4)
    for axes, project in zip(figure.subplots(1, len(projects), squeeze=False)[0], projects, strict=True):
        results = simulate(project, arguments.numbers, arguments.seeds)
        draw(axes, project.name, arguments.numbers, results)
        for name, accuracies in results.items():
            print(f"{project.name}, {name}: " + " ".join(f"{value:.2%}" for value in accuracies.mean(axis=0)))
    figure.axes[0].set_ylabel("test accuracy")
    figure.axes[0].legend()
    save_figure(output, figure)


if __name__ == "__main__":
    main()
