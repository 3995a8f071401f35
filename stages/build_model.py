"""Step 2: pretrained weights -> the initial checkpoint, a backbone with a new head."""

import argparse
from pathlib import Path

from stages.common.cli import run
from stages.common.format import enumerate_names
from stages.common.params import load_params
from stages.images.index import read_index
from stages.network.checkpoint import save_checkpoint
from stages.network.layer_table import write_layers
from stages.network.network import require_blocks
from stages.network.weights import build_initial


def main() -> None:
    """Build the network, load its weights, and describe what the head phase will train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument(
        "--index", type=Path, required=True, help="folder; train.csv names the classes and calibrates a random backbone"
    )
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--layers", type=Path, required=True, help="layer table to write, as .json and .txt")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    network, description, source = build_initial(params, read_index(arguments.index / "train.csv"))
    # Better said now than after the head phase.
    require_blocks(network, params.finetune.unfreeze)
    crop, classes = description.preprocessing.crop, enumerate_names(description.classes)
    write_layers(arguments.layers, network, crop)
    save_checkpoint(arguments.output, network, description)
    print(f"{description.arch}, weights {source}, {crop} px, classes: {classes}")


if __name__ == "__main__":
    run(main)
