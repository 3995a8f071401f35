"""Step 6: histories, predictions and test pictures -> figures, tables for DVC's plots, and the report."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.common.cli import StageError, run
from stages.common.files import write_text
from stages.common.params import Params, load_params
from stages.common.seeds import make_deterministic
from stages.images.index import PARTS, read_index
from stages.images.near_duplicates import read_leaks
from stages.images.summary import class_counts, read_summary
from stages.network.checkpoint import load_checkpoint, require_classes
from stages.report.figures import draw_numbers
from stages.report.galleries import Album, draw_pictures
from stages.report.loss_figure import describe_losses
from stages.report.page import Results, compose_report, describe_suspects, describe_training
from stages.report.probabilities import describe_probabilities
from stages.report.style import save_figure
from stages.scores.calibration import read_calibrations
from stages.scores.classes import read_classes
from stages.scores.curves import write_curves
from stages.scores.evaluation import read_evaluation
from stages.scores.predictions import count_once, read_predictions
from stages.scores.suspects import judge_all, read_suspects
from stages.training.history import read_alpha, read_history, read_selected
from stages.training.line import read_line
from stages.training.search import read_candidates


def main() -> None:
    """Draw what `evaluate` found and what the pictures show, and put it all on one page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True, help="folder with test.csv")
    parser.add_argument("--finetuned", type=Path, required=True, help="checkpoint")
    parser.add_argument("--split", type=Path, required=True, help="JSON file with the counts")
    parser.add_argument("--head-history", type=Path, required=True, help="folder")
    parser.add_argument("--finetune-history", type=Path, required=True, help="folder")
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON file with the scores")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON file: what the probabilities mean")
    parser.add_argument("--classes", type=Path, required=True, help="CSV file with each class's scores")
    parser.add_argument("--predictions", type=Path, required=True, help="CSV file")
    parser.add_argument("--probabilities", type=Path, required=True, help="NumPy archive with all predictions")
    parser.add_argument("--out-of-fold", type=Path, required=True, help="NumPy archive that train_head wrote")
    parser.add_argument("--near-duplicates", type=Path, required=True, help="CSV file")
    parser.add_argument("--suspects", type=Path, required=True, help="CSV file")
    parser.add_argument("--figures", type=Path, required=True, help="folder to write to")
    parser.add_argument("--curves", type=Path, required=True, help="folder to write DVC's tables to")
    parser.add_argument("--report", type=Path, required=True, help="Markdown file to write")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    index = arguments.index / "test.csv"
    test, predictions = read_index(index), read_predictions(arguments.predictions, arguments.probabilities)
    entries = count_once(test)
    if [entry.path for entry in entries] != predictions.paths:
        raise StageError(f"{arguments.predictions}: not the pictures of {index}; `dvc repro` makes both again")
    evaluation, classes = read_evaluation(arguments.evaluation), read_classes(arguments.classes)
    pairs = read_leaks(arguments.near_duplicates)
    split = read_summary(arguments.split)
    histories = (arguments.head_history, arguments.finetune_history)
    head, finetune = map(read_history, histories)
    selected = (read_selected(histories[0]), read_selected(histories[1]))
    alpha = read_alpha(histories[1])
    candidates, line = read_candidates(histories[0] / "candidates.csv"), read_line(histories[1] / "line.csv")

    make_deterministic(params.seed)
    network, description = load_checkpoint(arguments.finetuned)
    require_classes(arguments.finetuned, description, entries)
    album = Album(Path(params.data.path), entries, description.preprocessing)
    calibrations = read_calibrations(arguments.calibration)
    identical = evaluation.gain.identical
    drawn = replace(predictions, identical=identical)
    figures = draw_numbers(drawn, evaluation.scores, (head, finetune), selected, calibrations, (line, alpha))
    figures |= draw_pictures(drawn, album, network)
    for name, figure in figures.items():
        save_figure(arguments.figures / f"{name}.png", figure)
    write_curves(arguments.curves, predictions)
    folder = Path(os.path.relpath(arguments.figures, arguments.report.parent)).as_posix()
    captions = {"losses": describe_losses(drawn)}
    parts = {part: sum(counts[part] for counts in class_counts(split).values()) for part in PARTS}
    training = describe_training(head, finetune, selected, params, candidates, line, alpha, parts["train"])
    copies = len(test) - len(entries)
    judged = judge_all(predictions, arguments.out_of_fold)
    suspects = describe_suspects(read_suspects(arguments.suspects), judged, predictions.classes, split)
    out_of_fold = len(judged.paths) - len(entries)
    probabilities = describe_probabilities(calibrations, parts["val"], out_of_fold, identical)
    results = Results(evaluation, classes, copies, split, list_recipe(params), pairs, suspects, probabilities, training)
    write_text(arguments.report, compose_report(results, folder, captions))
    print(f"figures in {arguments.figures}, report in {arguments.report}")


def list_recipe(params: Params) -> dict[str, Any]:
    """Return all that the checkpoints hang on, by name; a section's are a dictionary."""
    return {
        "data": params.data.model_dump(),
        "seed": params.seed,
        "precision": params.precision,
        "split": params.split.model_dump(),
        "model": params.model.model_dump(),
        "class_weights": params.class_weights,
        "train_head": params.train_head.model_dump(),
        "finetune": params.finetune.model_dump(),
    }


if __name__ == "__main__":
    run(main)
