"""Which network? For each, the head that is found on its frozen features, by folds; how fast it is, and how large."""

import argparse
import shlex
from pathlib import Path

from tqdm import tqdm

from stages.common.cli import StageError, run
from stages.common.device import resolve_device
from stages.common.files import write_table
from stages.common.machine import reuse_freed_memory
from stages.common.params import Params, load_params
from stages.deploy.trial import Tried, draw_backbones, list_backbones, try_network, with_network
from stages.network.weights import build_initial
from stages.report.style import save_figure
from stages.training.phase import keep_features, read_entries

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
