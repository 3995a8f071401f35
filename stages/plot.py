"""Step 6: histories -> figures."""

import argparse
from pathlib import Path

from stages.common.command import run
from stages.common.figures import draw_accuracy, draw_loss, save_figure
from stages.common.history import read_history


def main() -> None:
    """Draw the loss and the accuracy of both phases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", type=Path, required=True, help="folder with the head phase's history")
    parser.add_argument("--finetune", type=Path, required=True, help="folder with the fine-tuning phase's history")
    parser.add_argument("--figures", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    head, finetune = read_history(arguments.head), read_history(arguments.finetune)
    save_figure(arguments.figures / "loss.png", draw_loss(head, finetune))
    save_figure(arguments.figures / "accuracy.png", draw_accuracy(head, finetune))
    print(f"figures in {arguments.figures}")


if __name__ == "__main__":
    run(main)
