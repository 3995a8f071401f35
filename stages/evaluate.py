"""Step 5: both checkpoints -> their scores on the test images, every prediction, and whether the test is clean."""

import argparse
from pathlib import Path

import numpy as np
import torch

from stages.common import ranks
from stages.common.cli import run
from stages.common.device import make_deterministic
from stages.common.files import read_table, sha256_of, write_record, write_table
from stages.common.machine import reuse_freed_memory
from stages.common.params import load_params
from stages.images.index import count_once, number_groups, read_index, read_summary
from stages.images.near_duplicates import Leak
from stages.network.checkpoint import load_checkpoint, require_classes
from stages.network.layer_table import write_layers
from stages.network.network import set_trainable
from stages.network.objective import probabilities
from stages.scores.calibration import measure_calibrations
from stages.scores.evaluation import (
    ClassScores,
    describe,
    describe_near_duplicates,
    evaluate,
    score_classes,
    write_evaluation,
)
from stages.scores.predictions import Predictions, compare_with_committed, write_predictions, write_probabilities
from stages.scores.suspects import Suspect, find_suspects, judge_all
from stages.training.phase import predict_with_both


def main() -> None:
    """Score the head and the fine-tuned checkpoint on the images that neither has seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True, help="folder with train.csv, val.csv and test.csv")
    parser.add_argument("--head", type=Path, required=True, help="checkpoint")
    parser.add_argument("--finetuned", type=Path, required=True, help="checkpoint")
    parser.add_argument("--out-of-fold", type=Path, required=True, help="NumPy archive that train_head wrote")
    parser.add_argument("--metrics", type=Path, required=True, help="folder with split.json, to write the results to")
    parser.add_argument("--probabilities", type=Path, required=True, help="NumPy archive to write: all predictions")
    arguments = parser.parse_args()
    params, metrics = load_params(arguments.params), arguments.metrics

    ranks.start_processes(params.processes, params.device)
    make_deterministic(params.seed)
    reuse_freed_memory()
    indices = [arguments.index / f"{part}.csv" for part in ("train", "val", "test")]
    ranks.require_same(params, [*indices, arguments.head, arguments.finetuned])
    _, val, test = map(read_index, indices)
    head, description = load_checkpoint(arguments.head)
    finetuned, finetuned_description = load_checkpoint(arguments.finetuned)
    require_classes(arguments.head, description, test)
    require_classes(arguments.finetuned, finetuned_description, test)
    tensors = finetuned.state_dict()
    identical = all(torch.equal(tensor, tensors[key]) for key, tensor in head.state_dict().items())

    different = count_once(test)
    logits = predict_with_both(head, finetuned, description, [*different, *val], params)
    temperatures = (description.temperature, finetuned_description.temperature)
    both = [probabilities(own, divisor).numpy() for own, divisor in zip(logits, temperatures, strict=True)]
    predictions = Predictions(
        [entry.path for entry in different],
        np.array([entry.label for entry in different]),
        description.classes,
        *(own[: len(different)] for own in both),
    )
    validation = np.array([entry.label for entry in val], np.int64), both[1][len(different) :]
    ranks.leave()
    groups = number_groups(different)
    classes, split = score_classes(predictions), read_summary(metrics / "split.json")
    leaks = read_table(metrics / "near_duplicates.csv", Leak, "split")
    evaluation = evaluate(predictions, groups, classes, split, leaks, identical)
    checkpoints = [sha256_of(path) for path in (arguments.head, arguments.finetuned)]
    set_trainable(finetuned, params.finetune.unfreeze)
    write_layers(metrics / "layers" / "finetune", finetuned, description.preprocessing.crop)
    write_probabilities(arguments.probabilities, predictions)
    write_predictions(metrics / "predictions.csv", predictions)
    write_table(metrics / "classes.csv", ClassScores, classes)
    suspects = find_suspects(*judge_all(predictions, arguments.out_of_fold), predictions.classes)
    write_table(metrics / "suspects.csv", Suspect, suspects)
    calibrations = measure_calibrations(predictions, temperatures, checkpoints, validation)
    write_record(metrics / "calibration.json", calibrations)
    write_evaluation(metrics, evaluation)
    print(describe(evaluation))
    if compared := compare_with_committed(metrics / "predictions.csv", predictions):
        print(compared)
    print(describe_near_duplicates(evaluation.near_duplicates, len(different)))


if __name__ == "__main__":
    run(main)
