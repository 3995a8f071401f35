"""Step 5: both checkpoints -> their scores on the test pictures, and every prediction."""

import argparse
from pathlib import Path

import numpy as np

from stages.common.checkpoint import load_checkpoint
from stages.common.command import run
from stages.common.device import make_deterministic, resolve_device
from stages.common.files import write_json
from stages.common.images import Batches
from stages.common.index import read_index
from stages.common.params import load_params
from stages.common.scoring import Probabilities, compare, score, write_predictions
from stages.common.training import Trainer
from stages.common.workers import resolve_workers


def main() -> None:
    """Score the head and the fine-tuned checkpoint on the pictures that neither has seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True, help="index file")
    parser.add_argument("--head", type=Path, required=True, help="checkpoint")
    parser.add_argument("--finetuned", type=Path, required=True, help="checkpoint")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--predictions", type=Path, required=True, help="CSV file to write")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    device, workers = resolve_device(params.device), resolve_workers(params.workers)
    entries = read_index(arguments.test)

    make_deterministic(params.seed)
    labels = np.array([entry.label for entry in entries])
    probabilities: dict[str, Probabilities] = {}
    for name in ("head", "finetuned"):
        network, description = load_checkpoint(getattr(arguments, name), entries)
        pictures = Batches(
            Path(params.data.path), entries, description.preprocessing, params.evaluate.batch_size, workers
        )
        probabilities[name] = Trainer(network, device).predict(pictures).numpy()

    scores = {name: score(labels, values) for name, values in probabilities.items()}
    write_predictions(arguments.predictions, entries, description.classes, probabilities)
    write_json(arguments.metrics, {**scores, "gain": compare(scores["head"], scores["finetuned"])})
    for name, title in (("head", "head phase"), ("finetuned", "fine-tuned")):
        print(f"{title}:  Test accuracy: {scores[name]['accuracy']:.2%}  loss: {scores[name]['loss']:.4f}")


if __name__ == "__main__":
    run(main)
