"""Step 3: the initial checkpoint -> the head checkpoint. The backbone is frozen, the head is trained."""

import argparse
from pathlib import Path

from stages.common.command import run
from stages.common.params import load_params
from stages.common.phase import Files, Setting, run_phase


def main() -> None:
    """Train the head."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    Files.add_to(parser)
    arguments = parser.parse_args()
    params = load_params(arguments.params)

    run_phase(
        Files.of(arguments),
        phase=params.train_head,
        unfreeze=0,
        setting=Setting(
            root=Path(params.data.path),
            seed=params.seed,
            device=params.device,
            workers=params.workers,
            precision=params.precision,
            class_weights=params.class_weights,
            max_gigabytes=params.cache.max_gigabytes,
        ),
        next_unfreeze=params.finetune.unfreeze,
    )


if __name__ == "__main__":
    run(main)
