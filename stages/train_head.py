"""Step 3: the initial checkpoint -> the head checkpoint. The backbone is frozen, the head is trained."""

import argparse
from pathlib import Path

from stages.common.params import load_params
from stages.common.stage import run
from stages.common.workers import resolve_workers
from stages.network.network import cut, set_trainable
from stages.network.objective import weigh_classes
from stages.training.activations import FrozenPrefix
from stages.training.history import History, still_falling
from stages.training.phase import add_arguments, calibrate, finish, load, open_inputs, open_state, prepare
from stages.training.trainer import Trainer


def main() -> None:
    """Train the head."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    phase = params.train_head

    device = prepare(params)
    network, description, pictures = load(arguments.start, arguments.index)
    set_trainable(network, unfreeze=0)
    blocks, tail = cut(network.to(device), unfreeze=0)
    root, workers = Path(params.data.path), resolve_workers(params.workers)
    prefix = FrozenPrefix(blocks, root, description.preprocessing, device, params.precision, workers)
    train, watched = open_inputs(prefix, pictures, phase, params, params.ahead.finetune)

    history, state = History(arguments.history), open_state(__file__, arguments, phase, params, device)
    trainer = Trainer(tail, device, params.precision, weigh_classes(params.class_weights, pictures.train))
    fit = trainer.fit(train, watched, phase, history.add, state)
    description = calibrate(description, trainer, fit, watched, pictures)
    finish(arguments.output, network.cpu(), description, fit, history, state)
    if still_falling(fit.epochs, phase.epochs, phase.patience):
        print(f"the validation loss was still falling after all {phase.epochs} epochs: raise train_head.epochs")


if __name__ == "__main__":
    run(main)
