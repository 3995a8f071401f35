"""Which learning rate to try: a short training in memory in which the rate rises until the loss explodes."""

import argparse
from pathlib import Path

from stages.common.params import Phase, load_params
from stages.common.stage import run
from stages.network.network import cut, set_trainable
from stages.network.objective import weigh_classes
from stages.report.rates import draw_rates
from stages.report.style import save_figure
from stages.training.activations import keep
from stages.training.inputs import open_batches
from stages.training.phase import load, open_prefix, prepare
from stages.training.rate_finder import advise, sweep_rates, valley
from stages.training.trainer import Trainer

STARTS = {"train_head": "initial", "finetune": "head"}


def main() -> None:
    """Try all rates on what a phase starts from, in memory; print the one to take and draw the losses."""
    parser = argparse.ArgumentParser(prog="python -m stages.rate", description=__doc__)
    parser.add_argument("phase", nargs="?", choices=STARTS, default="finetune", help="default: finetune")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--index", type=Path, default=Path("data/index"), help="folder with train.csv")
    parser.add_argument("--start", type=Path, help="checkpoint; default: that of the phase, in data/checkpoints")
    parser.add_argument("--output", type=Path, help="figure to write; default: data/rate_PHASE.png")
    arguments = parser.parse_args()
    name = arguments.phase
    params = load_params(arguments.params)
    phase: Phase = params.train_head
    unfreeze, layer_decay = 0, 1.0
    if name == "finetune":
        phase = params.finetune
        unfreeze, layer_decay = params.finetune.unfreeze, params.finetune.layer_decay

    device = prepare(params)
    start = arguments.start or Path(f"data/checkpoints/{STARTS[name]}.safetensors")
    network, description, pictures = load(start, arguments.index, params)
    set_trainable(network, unfreeze)
    blocks, tail = cut(network.to(device), unfreeze)
    prefix = open_prefix(blocks, description, device, params)
    unchanging = pictures.train if phase.augment == "none" else []
    later = {params.finetune.unfreeze: unchanging} if name == "train_head" else None
    kept = keep(prefix, unchanging, params.cache.max_gigabytes, also=later)
    train = open_batches(prefix, pictures.train, kept, phase.batch_size, phase.augment, shuffle_seed=params.seed)

    trainer = Trainer(tail, device, params.precision, weigh_classes(params.class_weights, pictures.train))
    sweep = sweep_rates(trainer, train, phase, layer_decay)
    found = valley(sweep.rates, sweep.losses)
    print(advise(name, sweep, found))
    output = arguments.output or Path(f"data/rate_{name}.png")
    save_figure(output, draw_rates(sweep, found, name, phase.lr))
    print(f"figure in {output}")


if __name__ == "__main__":
    run(main)
