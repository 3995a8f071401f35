"""Step 4: the head checkpoint -> the fine-tuned checkpoint. The last blocks are trained too, at a very low rate."""

import argparse
from pathlib import Path

from stages.common.command import run
from stages.common.layers import write_layers
from stages.common.params import load_params
from stages.common.phase import Files, Setting, run_phase


def main() -> None:
    """Train the last blocks, without their BatchNorm, and go on training the head."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    Files.add_to(parser)
    parser.add_argument("--layers", type=Path, required=True, help="layer table to write, as .json and .txt")
    arguments = parser.parse_args()
    params = load_params(arguments.params)

    network, description = run_phase(
        Files.of(arguments),
        phase=params.finetune,
        unfreeze=params.finetune.unfreeze,
        setting=Setting(
            root=Path(params.data.path),
            seed=params.seed,
            device=params.device,
            workers=params.workers,
            precision=params.precision,
            class_weights=params.class_weights,
            max_gigabytes=params.cache.max_gigabytes,
        ),
    )
    write_layers(arguments.layers, network, description.preprocessing.crop)


if __name__ == "__main__":
    run(main)
