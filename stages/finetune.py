"""Step 4: the head checkpoint -> the fine-tuned checkpoint. The last blocks are trained too, at a very low rate."""

import argparse
from dataclasses import replace
from pathlib import Path

from stages.common import ranks
from stages.common.cli import run
from stages.common.files import write_table
from stages.common.params import load_params
from stages.images.index import number_groups
from stages.network.network import cut, describe_untrained, set_trainable
from stages.network.objective import weigh_classes
from stages.training.batches import open_batches
from stages.training.features import keep
from stages.training.history import History
from stages.training.line import Point
from stages.training.loop import Trainer
from stages.training.phase import add_arguments, finish, load, open_prefix, open_state, prepare, require_enough
from stages.training.reference import measure_unlike, write_reference


def main() -> None:
    """Train the last blocks, without their BatchNorm, and go on training the head."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--reference", type=Path, required=True, help="file to write: what `unlike` is measured by")
    arguments = parser.parse_args()
    params = load_params(arguments.params)

    device = prepare(params)
    network, description, entries = load(arguments.start, arguments.index, params)
    phase = params.finetune.settle(len(entries.train), entries.watches_test)
    if phase.select != params.finetune.select:
        print("no validation images: the end of the schedule is kept, as with finetune.select=last")
    require_enough(phase, len(entries.train))
    set_trainable(network, phase.unfreeze)
    if untrained := describe_untrained(network, phase.unfreeze):
        print(untrained)
    blocks, tail = cut(network.to(device), phase.unfreeze)

    prefix = open_prefix(blocks, description, device, params)
    kept = keep(prefix, {len(blocks): entries.unchanging(phase)}, params.cache.max_gigabytes)[len(blocks)]
    train = open_batches(prefix, entries.train, kept, phase.batch_size, phase.augment, params.seed)
    watched = open_batches(prefix, entries.watched, kept, phase.batch_size)

    history, state = History(arguments.history), open_state(__file__, arguments, phase, params)
    weights = weigh_classes(params.class_weights, entries.train)
    trainer = Trainer(tail, device, params.precision, weights, tempered=not entries.watches_test)
    # The head checkpoint competes: where nothing is better, it is the result.
    groups = number_groups(entries.watched)
    fit = trainer.fit(train, watched, phase, history.add, state, True, phase.layer_decay, groups)
    unlike = measure_unlike(tail, prefix, kept, entries, phase.batch_size, params.precision, params.seed)

    ranks.leave()
    write_table(arguments.history / "line.csv", Point, fit.line)
    recipe = description.recipe | {"finetune": params.finetune.model_dump()}
    description = replace(description, recipe=recipe)
    finish(arguments.output, network, description, fit, entries, history, state, phase, calibrated=True)
    write_reference(arguments.reference, unlike, arguments.output)


if __name__ == "__main__":
    run(main)
