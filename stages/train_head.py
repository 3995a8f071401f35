"""Step 3: the initial checkpoint -> the head checkpoint. The backbone is frozen, the head is found or trained."""

import argparse
from pathlib import Path

from stages.common.cli import run
from stages.common.params import load_params
from stages.common.ranks import start_processes
from stages.network.network import cut, set_trainable
from stages.network.objective import weigh_classes
from stages.training.history import still_falling
from stages.training.loop import Fit, Trainer
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
    search_head,
)
from stages.training.search import Found, describe_search, write_candidates, write_out_of_fold


def main() -> None:
    """Find the head on the kept features, or train it as the parameters say."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--candidates", type=Path, required=True, help="CSV file to write: the heads that were tried")
    parser.add_argument("--out-of-fold", type=Path, required=True, help="NumPy archive to write: their predictions")
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
    weights = weigh_classes(params.class_weights, pictures.train)

    history, state = open_history(arguments), open_state(__file__, arguments, phase, params, device)
    found: Found | None = None
    if phase.search and description.head == "pooled":
        found = search_head(prefix, pictures, description, params, weights)
        description = found.install(network, description)
        print(describe_search(found))
    if found is not None and phase.augment == "none" and not phase.mixup:
        fit = Fit(found.epochs, found.epochs[-1])
        for epoch in fit.epochs:
            history.add(epoch)
    else:
        _, tail = cut(network.to(device), unfreeze=0)
        trainer = Trainer(tail, device, params.precision, weights, tempered=not pictures.watches_test)
        # A head that was found on the images as they are competes with what augmentation makes of it.
        fit = trainer.fit(train, watched, phase, history.add, state, keep_start=found is not None)
        description = describe(description, fit, pictures)
    if history.writes:
        write_candidates(arguments.candidates, found.candidates if found else [])
        write_out_of_fold(arguments.out_of_fold, found)
    finish(arguments.output, network.cpu(), description, fit, history, state)
    if found is None and still_falling(fit.epochs, phase.epochs, phase.patience):
        print(f"the validation loss was still falling after all {phase.epochs} epochs: raise train_head.epochs")


if __name__ == "__main__":
    run(main)
