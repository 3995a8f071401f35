"""Step 5: both checkpoints -> their scores on the test pictures, and every prediction."""

import argparse
from pathlib import Path

import numpy as np

from stages.common.activations import Source, keep, make_inputs
from stages.common.checkpoint import load_checkpoint
from stages.common.command import run
from stages.common.device import Precision, make_deterministic, resolve_device
from stages.common.files import write_json
from stages.common.index import read_index
from stages.common.network import count_shared_blocks, cut
from stages.common.params import load_params
from stages.common.scoring import compare, score, write_predictions
from stages.common.training import Trainer, predict
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
    device, precision = resolve_device(params.device), Precision(params.precision)
    entries = read_index(arguments.test)

    make_deterministic(params.seed)
    head, description = load_checkpoint(arguments.head, entries)
    finetuned, _ = load_checkpoint(arguments.finetuned, entries)
    unfrozen = len(head.backbone) - count_shared_blocks(head, finetuned)
    prefix, tail = cut(head.to(device), unfrozen)
    source = Source(
        Path(params.data.path), description.preprocessing, prefix, device, precision, resolve_workers(params.workers)
    )
    kept = keep(source, entries, params.cache.max_gigabytes)
    trainers = [Trainer(network, device, precision) for network in (tail, cut(finetuned, unfrozen)[1])]
    predictions = predict(trainers, make_inputs(source, kept, entries, params.evaluate.batch_size))

    labels = np.array([entry.label for entry in entries])
    probabilities = {name: values.numpy() for name, values in zip(("head", "finetuned"), predictions, strict=True)}
    scores = {name: score(labels, values) for name, values in probabilities.items()}
    write_predictions(arguments.predictions, entries, description.classes, probabilities)
    write_json(arguments.metrics, {**scores, "gain": compare(scores["head"], scores["finetuned"])})
    for name, title in (("head", "head phase"), ("finetuned", "fine-tuned")):
        print(f"{title}:  Test accuracy: {scores[name]['accuracy']:.2%}  loss: {scores[name]['loss']:.4f}")


if __name__ == "__main__":
    run(main)
