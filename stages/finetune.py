"""Step 4: the head checkpoint -> the fine-tuned checkpoint. The last blocks are trained too, at a very low rate."""

import argparse
from pathlib import Path

from stages.common.cli import run
from stages.common.params import load_params
from stages.common.ranks import start_processes
from stages.network.layer_table import write_layers
from stages.network.network import cut, set_trainable
from stages.network.objective import weigh_classes
from stages.training.line import write_line
from stages.training.loop import Trainer
from stages.training.phase import (
    add_arguments,
    describe,
    finish,
    load,
    open_history,
    open_inputs,
    open_prefix,
    open_state,
    prepare,
    settle,
)


def main() -> None:
    """Train the last blocks, without their BatchNorm, and go on training the head."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--line", type=Path, required=True, help="CSV file to write: points between start and end")
    parser.add_argument("--layers", type=Path, required=True, help="layer table to write, as .json and .txt")
    arguments = parser.parse_args()
    params = load_params(arguments.params)

    start_processes(params.processes, params.device)
    device = prepare(params)
    network, description, pictures = load(arguments.start, arguments.index, params)
    phase = settle(params.finetune, pictures)
    set_trainable(network, phase.unfreeze)
    blocks, tail = cut(network.to(device), phase.unfreeze)
    prefix = open_prefix(blocks, description, device, params)
    train, watched = open_inputs(prefix, pictures, phase, params)

    history, state = open_history(arguments), open_state(__file__, arguments, phase, params, device)
    weights = weigh_classes(params.class_weights, pictures.train)
    trainer = Trainer(tail, device, params.precision, weights, tempered=not pictures.watches_test)
    # The head checkpoint competes: where nothing is better, it is the result.
    fit = trainer.fit(train, watched, phase, history.add, state, keep_start=True, layer_decay=phase.layer_decay)
    if history.writes:
        write_line(arguments.line, fit.line)
    finish(arguments.output, network.cpu(), describe(description, fit, pictures), fit, history, state)
    write_layers(arguments.layers, network, description.preprocessing.crop)


if __name__ == "__main__":
    run(main)
