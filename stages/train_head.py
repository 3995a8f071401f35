"""Step 3: the initial checkpoint -> the head checkpoint. The backbone is frozen, the head is found or trained."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from stages.common import ranks
from stages.common.cli import run
from stages.common.files import write_table
from stages.common.params import load_params
from stages.network.network import cut, set_trainable
from stages.network.objective import weigh_classes
from stages.training.batches import READ_AT_ONCE, open_batches, read_all
from stages.training.history import History, still_falling
from stages.training.loop import Fit, Trainer
from stages.training.phase import add_arguments, finish, keep_features, load, open_state, prepare, require_enough
from stages.training.search import Candidate, Found, describe_search, find_head, write_out_of_fold


def main() -> None:
    """Find the head on the kept features, or train it as the parameters say."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--out-of-fold", type=Path, required=True, help="NumPy archive to write: their predictions")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    phase = params.train_head

    device = prepare(params)
    network, description, entries = load(arguments.start, arguments.index, params)
    require_enough(phase, len(entries.train))
    set_trainable(network, unfreeze=0)

    prefix, kept = keep_features(network, description, entries, device, params)
    train = open_batches(prefix, entries.train, kept, phase.batch_size, phase.augment, params.seed)
    watched = open_batches(prefix, entries.watched, kept, phase.batch_size)
    weights = weigh_classes(params.class_weights, entries.train)

    history, state = History(arguments.history), open_state(__file__, arguments, phase, params)
    found: Found | None = None
    if phase.search and description.head == "pooled":
        read = partial(read_all, prefix, kept=kept, batch_size=READ_AT_ONCE, title="features")
        found = find_head(read, entries, description.recipe["model"]["hidden"], phase, weights, params.seed, device)
        description = found.install(network, description)
        print(describe_search(found))
    if found is not None and phase.augment == "none" and not phase.mixup:
        fit = Fit(found.epochs, found.epochs[-1])
        for epoch in fit.epochs:
            history.add(epoch)
    else:
        _, tail = cut(network.to(device), unfreeze=0)
        trainer = Trainer(tail, device, params.precision, weights, tempered=not entries.watches_test)
        # A head that was found on the images as they are competes with what augmentation makes of it.
        fit = trainer.fit(train, watched, phase, history.add, state, keep_start=found is not None)

    ranks.leave()
    write_table(arguments.history / "candidates.csv", Candidate, found.candidates if found else [])
    write_out_of_fold(arguments.out_of_fold, found)
    recipe = {"precision": params.precision, "class_weights": params.class_weights, "train_head": phase.model_dump()}
    description = replace(description, recipe=description.recipe | recipe)
    calibrated = found is not None and not fit.epochs[0].number
    finish(arguments.output, network, description, fit, entries, history, state, phase, calibrated)
    if found is None and still_falling(fit.epochs, phase.epochs, phase.patience):
        print(f"the validation loss was still falling after all {phase.epochs} epochs: raise train_head.epochs")


if __name__ == "__main__":
    run(main)
