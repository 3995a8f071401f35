"""Step 2: pretrained weights -> the initial checkpoint, a backbone with a new head."""

import argparse
from itertools import islice
from pathlib import Path

from stages.common.checkpoint import Description, save_checkpoint
from stages.common.command import run
from stages.common.device import make_deterministic
from stages.common.images import Batches
from stages.common.index import class_names, read_index
from stages.common.layers import write_layers
from stages.common.network import build_network, calibrate_batchnorm, require_blocks, set_trainable, stock_model
from stages.common.objective import outputs_for
from stages.common.params import load_params
from stages.common.weights import find_weights, load_into
from stages.common.workers import resolve_workers

# More pictures change the statistics of a random network hardly any more.
CALIBRATION_BATCHES, CALIBRATION_BATCH = 16, 64


def main() -> None:
    """Build the network, load its weights, and describe what the head phase will train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument(
        "--train", type=Path, required=True, help="index file; tells the classes, and calibrates a random backbone"
    )
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--layers", type=Path, required=True, help="layer table to write, as .json and .txt")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    model = params.model
    entries = read_index(arguments.train)
    classes = class_names(entries)

    make_deterministic(params.seed)
    stock = stock_model(model.arch)
    weights = find_weights(model.arch, model.weights)
    load_into(stock, weights, model.arch)
    preprocessing = weights.preprocessing.with_image_size(model.image_size)
    network = build_network(stock, model.head, model.hidden, outputs_for(len(classes)), preprocessing.crop)
    # Better said now than after the head phase.
    require_blocks(network, params.finetune.unfreeze)
    if weights.source is None:
        root, workers = Path(params.data.path), resolve_workers(params.workers)
        pictures = Batches(root, entries, preprocessing, CALIBRATION_BATCH, workers, shuffle_seed=params.seed)
        images = (images for images, _ in islice(pictures, CALIBRATION_BATCHES) if len(images) > 1)
        calibrate_batchnorm(network, images)
    set_trainable(network, 0)

    description = Description(
        model.arch, model.head, model.hidden, tuple(classes), preprocessing, weights.source, weights.sha256
    )
    write_layers(arguments.layers, network, preprocessing.crop)
    save_checkpoint(arguments.output, network, description)
    print(f"{model.arch}, weights {weights.source or 'random'}, {preprocessing.crop} px, classes: {', '.join(classes)}")


if __name__ == "__main__":
    run(main)
