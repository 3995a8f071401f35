"""Step 5: both checkpoints -> their scores on the test pictures, every prediction, and whether the test is clean."""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from stages.common.device import resolve_device
from stages.common.params import Params, load_params
from stages.common.seeds import make_deterministic
from stages.common.stage import run
from stages.common.workers import resolve_workers
from stages.network.checkpoint import Description, load_checkpoint, require_classes
from stages.network.network import Network, count_shared_blocks, cut, pool_features
from stages.pictures.index import Entry, read_index
from stages.pictures.summary import read_summary
from stages.scores.classes import score_classes, write_classes
from stages.scores.evaluation import Evaluation, describe, write_evaluation
from stages.scores.metrics import score
from stages.scores.near_duplicates import (
    Similar,
    describe_near_duplicates,
    name_pairs,
    summarize,
    write_near_duplicates,
)
from stages.scores.orientations import find_turned, join
from stages.scores.predictions import Predictions, count_once, write_predictions, write_probabilities
from stages.scores.remarks import compare_balanced, find_remarks
from stages.scores.similarity import THRESHOLD, find_similar, thin
from stages.scores.suspects import find_suspects, write_suspects
from stages.scores.verdict import compare
from stages.training.activations import FrozenPrefix
from stages.training.thumbnails import thumbnails_of
from stages.training.trainer import Trainer, predict


def main() -> None:
    """Score the head and the fine-tuned checkpoint on the pictures that neither has seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True, help="folder with train.csv, val.csv and test.csv")
    parser.add_argument("--head", type=Path, required=True, help="checkpoint")
    parser.add_argument("--finetuned", type=Path, required=True, help="checkpoint")
    parser.add_argument("--split", type=Path, required=True, help="JSON file with the counts")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--classes", type=Path, required=True, help="CSV file to write, of each class's scores")
    parser.add_argument("--predictions", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--probabilities", type=Path, required=True, help="NumPy archive to write: all predictions")
    parser.add_argument("--near-duplicates", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--suspects", type=Path, required=True, help="CSV file to write: labels that may be wrong")
    arguments = parser.parse_args()
    params = load_params(arguments.params)

    make_deterministic(params.seed)
    train, val, test = (read_index(arguments.index / f"{part}.csv") for part in ("train", "val", "test"))
    head, description = load_checkpoint(arguments.head)
    finetuned, same_description = load_checkpoint(arguments.finetuned)
    require_classes(arguments.head, description, test)
    require_classes(arguments.finetuned, same_description, test)

    different, known = count_once(test), count_once([*train, *val])
    predictions, features = predict_with_both(head, finetuned, description, different, params)
    by_features = find_among(known, features, head, description, params)
    similar = join([by_features, find_turned_among(known, different, description, params)])
    classes, balanced = score_classes(predictions), compare_balanced(predictions)
    split = read_summary(arguments.split)
    evaluation = Evaluation(
        score(predictions.labels, predictions.head),
        score(predictions.labels, predictions.finetuned),
        compare(predictions.labels, predictions.head, predictions.finetuned),
        summarize(similar, THRESHOLD, predictions),
        balanced,
        find_remarks(classes, balanced, split, len(test) - len(different)),
    )
    write_probabilities(arguments.probabilities, predictions)
    write_predictions(arguments.predictions, predictions)
    write_classes(arguments.classes, classes)
    write_near_duplicates(arguments.near_duplicates, name_pairs(similar, known, different))
    write_suspects(
        arguments.suspects,
        find_suspects(predictions.paths, predictions.labels, predictions.finetuned, predictions.classes),
    )
    write_evaluation(arguments.metrics, evaluation)
    print(describe(evaluation))
    print(describe_near_duplicates(evaluation.near_duplicates, len(different)))


def predict_with_both(
    head: Network, finetuned: Network, description: Description, test: list[Entry], params: Params
) -> tuple[Predictions, Tensor]:
    """Predict with both networks in one pass, behind the blocks that they share.

    Returns:
        The predictions, and what enters the classifier of `head`, pooled: (n, channels).
    """
    unfrozen = len(head.backbone) - count_shared_blocks(head, finetuned)
    device = resolve_device(params.device)
    blocks, tail = cut(head.to(device), unfrozen)
    prefix = put_in_front(description, params)(blocks)
    kept = prefix.keep(test, params.cache.max_gigabytes)
    trainers = [Trainer(network, device, params.precision) for network in (tail, cut(finetuned, unfrozen)[1])]
    features: list[Tensor] = []
    before, after = predict(
        trainers,
        prefix.batches(test, kept, params.evaluate.batch_size),
        on_features=lambda activations: features.append(pool_features(activations.float()).cpu()),
    )
    labels = np.array([entry.label for entry in test])
    paths = [entry.path for entry in test]
    return Predictions(paths, labels, description.classes, before.numpy(), after.numpy()), torch.cat(features)


def find_among(
    known: list[Entry], features: Tensor, head: Network, description: Description, params: Params
) -> Similar:
    """Find test pictures, by their `features`, that are nearly the same as one that training has seen."""
    whole = put_in_front(description, params)(head.backbone)
    kept = whole.keep(known, params.cache.max_gigabytes)

    def features_of(entries: list[Entry], doing: str) -> Iterator[Tensor]:
        batches = whole.batches(entries, kept, params.evaluate.batch_size)
        for activations, _ in tqdm(batches, desc=doing, unit="batch", disable=None):
            yield pool_features(activations.float()).cpu()

    some = thin(known)
    sample = torch.cat(list(features_of(some, "features")))
    batches = [sample] if len(some) == len(known) else features_of(known, "looking for near-duplicates")
    return find_similar(sample, batches, features, params.precision)


def find_turned_among(known: list[Entry], test: list[Entry], description: Description, params: Params) -> Similar:
    """Find test pictures that are thumbnails, mirrored or turned copies of one that training has seen."""
    like = put_in_front(description, params)(nn.Sequential())
    read = thumbnails_of([*known, *test], like, params.cache.max_gigabytes, params.evaluate.batch_size)
    some = thin(known)
    sample = torch.cat(list(read(some)))
    train = [sample] if len(some) == len(known) else read(known)
    return find_turned(sample, train, torch.cat(list(read(test))))


def put_in_front(description: Description, params: Params) -> partial[FrozenPrefix]:
    """Return what makes a `FrozenPrefix` of some blocks."""
    return partial(
        FrozenPrefix,
        root=Path(params.data.path),
        preprocessing=description.preprocessing,
        device=resolve_device(params.device),
        precision=params.precision,
        workers=resolve_workers(params.workers),
    )


if __name__ == "__main__":
    run(main)
