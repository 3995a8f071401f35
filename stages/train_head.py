"""Step 3: the initial checkpoint -> the head checkpoint. The backbone is frozen, the head is trained."""

import argparse

from stages.common.params import load_params
from stages.common.processes import start_processes
from stages.common.stage import run
from stages.network.network import cut, set_trainable
from stages.network.objective import weigh_classes
from stages.training.history import still_falling
from stages.training.phase import (
    add_arguments,
    calibrate,
    finish,
    load,
    open_history,
    open_inputs,
    open_prefix,
    open_state,
    prepare,
)
from stages.training.trainer import Trainer


def main() -> None:
    """Train the head."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    phase = params.train_head

    start_processes(params.processes, params.device)
    device = prepare(params)
    network, description, pictures = load(arguments.start, arguments.index, params)
    set_trainable(network, unfreeze=0)
    blocks, tail = cut(network.to(device), unfreeze=0)
    prefix = open_prefix(blocks, description, device, params)
    train, watched = open_inputs(prefix, pictures, phase, params, params.ahead.finetune)

    history, state = open_history(arguments), open_state(__file__, arguments, phase, params, device)
    trainer = Trainer(tail, device, params.precision, weigh_classes(params.class_weights, pictures.train))
    fit = trainer.fit(train, watched, phase, history.add, state)
    description = calibrate(description, trainer, fit, watched, pictures)
    finish(arguments.output, network.cpu(), description, fit, history, state)
    if still_falling(fit.epochs, phase.epochs, phase.patience):
        print(f"the validation loss was still falling after all {phase.epochs} epochs: raise train_head.epochs")


if __name__ == "__main__":
    run(main)
