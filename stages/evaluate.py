"""Step 5: both checkpoints -> their scores on the test pictures, every prediction, and whether the test is clean."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from stages.common import near_duplicates, scoring
from stages.common.activations import Source, keep, make_inputs
from stages.common.checkpoint import load_checkpoint
from stages.common.command import run
from stages.common.device import Precision, make_deterministic, resolve_device
from stages.common.files import write_json
from stages.common.index import read_index
from stages.common.network import count_shared_blocks, cut
from stages.common.params import load_params
from stages.common.training import Trainer, predict
from stages.common.workers import resolve_workers


def main() -> None:
    """Score the head and the fine-tuned checkpoint on the pictures that neither has seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    for part in ("train", "val", "test"):
        parser.add_argument(f"--{part}", type=Path, required=True, help="index file")
    parser.add_argument("--head", type=Path, required=True, help="checkpoint")
    parser.add_argument("--finetuned", type=Path, required=True, help="checkpoint")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--predictions", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--near-duplicates", type=Path, required=True, help="CSV file to write")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    device, precision = resolve_device(params.device), Precision(params.precision)
    entries, known = read_index(arguments.test), [*read_index(arguments.train), *read_index(arguments.val)]

    make_deterministic(params.seed)
    head, description = load_checkpoint(arguments.head, entries)
    finetuned, _ = load_checkpoint(arguments.finetuned, entries)
    unfrozen = len(head.backbone) - count_shared_blocks(head, finetuned)
    prefix, tail = cut(head.to(device), unfrozen)
    workers = resolve_workers(params.workers)
    source = Source(Path(params.data.path), description.preprocessing, prefix, device, precision, workers)
    kept = keep(source, entries, params.cache.max_gigabytes)
    trainers = [Trainer(network, device, precision) for network in (tail, cut(finetuned, unfrozen)[1])]
    with near_duplicates.collect_pooled(trainers[0].backbone) as features:
        predictions = predict(trainers, make_inputs(source, kept, entries, params.evaluate.batch_size))

    whole = replace(source, prefix=head.backbone)
    kept = keep(whole, known, params.cache.max_gigabytes)
    known_features = near_duplicates.pooled_inputs(make_inputs(whole, kept, known, params.evaluate.batch_size))
    found = near_duplicates.find_near_duplicates(known_features, torch.cat(features), precision.dtype)
    pairs = near_duplicates.name_pairs(found, known, entries)

    labels = np.array([entry.label for entry in entries])
    models = {name: values.numpy() for name, values in zip(("head", "finetuned"), predictions, strict=True)}
    scores = {name: scoring.score(labels, values, description.classes) for name, values in models.items()}
    gain = scoring.compare(labels, **models)
    clean = near_duplicates.summarize(pairs, [entry.path for entry in entries], labels, models)
    scoring.write_predictions(arguments.predictions, entries, description.classes, models)
    near_duplicates.write_near_duplicates(arguments.near_duplicates, pairs)
    write_json(arguments.metrics, {**scores, "gain": gain, "near_duplicates": clean})
    print(scoring.table(**scores, gain=gain), scoring.sentence(gain), sep="\n")
    print(near_duplicates.sentence(clean, len(entries)))


if __name__ == "__main__":
    run(main)
