"""Step 2: pretrained weights -> the initial checkpoint, a backbone with a new head."""

import argparse
from itertools import islice
from pathlib import Path

from stages.common.cli import run
from stages.common.format import enumerate_names
from stages.common.machine import resolve_workers
from stages.common.params import load_params
from stages.common.seeds import make_deterministic
from stages.images.batches import Batches, Order
from stages.images.index import class_names, read_index
from stages.network.backbones import stock_model
from stages.network.checkpoint import Description, continue_from, save_checkpoint
from stages.network.layer_table import write_layers
from stages.network.network import build_network, calibrate_batchnorm, require_blocks, set_trainable
from stages.network.objective import outputs_for
from stages.network.weights import find_weights, load_into

# More images change the statistics of a random network hardly any more.
CALIBRATION_BATCHES, CALIBRATION_BATCH = 16, 64


def main() -> None:
    """Build the network, load its weights, and describe what the head phase will train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument(
        "--index",
        type=Path,
        required=True,
        help="folder; train.csv names the classes and calibrates a random backbone",
    )
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--layers", type=Path, required=True, help="layer table to write, as .json and .txt")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    model = params.model
    entries = read_index(arguments.index / "train.csv")
    classes = class_names(entries)

    make_deterministic(params.seed)
    weights = find_weights(model.arch, model.weights)
    preprocessing = weights.preprocessing.framed(model.image_size, model.framing, params.data.grey_max)
    stock = stock_model(model.arch, preprocessing.crop)
    load_into(stock, weights, model.arch)
    hidden, standardized, own = model.hidden, False, weights.own
    if own is not None and (own.head, own.classes) == (model.head, tuple(classes)):
        hidden, standardized = own.hidden, own.standardized
    network = build_network(stock, model.head, hidden, outputs_for(len(classes)), preprocessing.crop, standardized)
    description = Description(
        model.arch,
        model.head,
        hidden,
        tuple(classes),
        preprocessing,
        weights.source,
        weights.sha256,
        standardized=standardized,
        recipe={"seed": params.seed, "model": model.model_dump()},
    )
    head = ""
    if own is not None:
        kept = continue_from(network, description, weights.tensors, own)
        head = f" with {'its' if kept else 'a new'} head"
    # Better said now than after the head phase.
    require_blocks(network, params.finetune.unfreeze)
    if weights.source is None:
        root, workers = Path(params.data.path), resolve_workers(params.workers)
        order = Order(len(entries), params.seed)
        batches = Batches(root, entries, preprocessing, CALIBRATION_BATCH, workers, order=order)
        images = (images for images, _ in islice(batches, CALIBRATION_BATCHES) if len(images) > 1)
        calibrate_batchnorm(network, images)
    set_trainable(network, 0)
    write_layers(arguments.layers, network, preprocessing.crop)
    save_checkpoint(arguments.output, network, description)
    source = weights.source or "random"
    print(f"{model.arch}, weights {source}{head}, {preprocessing.crop} px, classes: {enumerate_names(classes)}")


if __name__ == "__main__":
    run(main)
