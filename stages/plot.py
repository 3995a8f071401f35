"""Step 6: histories, predictions and test images -> figures, tables for DVC's plots, and the report."""

import argparse
from dataclasses import replace
from pathlib import Path

from stages.common.cli import StageError, run
from stages.common.device import make_deterministic
from stages.common.files import read_record, read_table, write_text
from stages.common.params import Section, load_params
from stages.images.index import PARTS, count_once, read_index, read_summary
from stages.images.near_duplicates import Leak
from stages.network.checkpoint import load_checkpoint, require_classes
from stages.report.figures import (
    describe_losses,
    draw_confusion,
    draw_coverage,
    draw_curves,
    draw_losses,
    draw_reliability,
    draw_training,
)
from stages.report.galleries import Album, draw_alike, draw_changed, draw_confused, draw_wrong
from stages.report.page import compose_report, describe_probabilities, describe_suspects, describe_training
from stages.report.style import save_figure
from stages.scores.calibration import Calibrations
from stages.scores.curves import write_curves
from stages.scores.evaluation import ClassScores, count_parts, describe, read_evaluation
from stages.scores.predictions import read_predictions
from stages.scores.suspects import Suspect, judge_all
from stages.training.history import read_history, read_kept
from stages.training.line import Point
from stages.training.search import Candidate

# All that the checkpoints depend on.
RECIPE = ("data", "seed", "precision", "split", "model", "class_weights", "train_head", "finetune")


def main() -> None:
    """Draw what `evaluate` found and what the images show, and put it all on one page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True, help="folder with all parts")
    parser.add_argument("--finetuned", type=Path, required=True, help="checkpoint")
    parser.add_argument("--out-of-fold", type=Path, required=True, help="NumPy archive that train_head wrote")
    parser.add_argument("--probabilities", type=Path, required=True, help="NumPy archive with all predictions")
    parser.add_argument("--metrics", type=Path, required=True, help="folder with all results, to write to")
    arguments = parser.parse_args()
    params, metrics = load_params(arguments.params), arguments.metrics
    every = {part: read_index(arguments.index / f"{part}.csv") for part in PARTS}
    entries, predictions = count_once(every["test"]), read_predictions(arguments.probabilities)
    if [entry.path for entry in entries] != predictions.paths:
        problem = f"not the images of {arguments.index}; `dvc repro` makes both again"
        raise StageError(f"{arguments.probabilities}: {problem}")
    evaluation, classes = read_evaluation(metrics), read_table(metrics / "classes.csv", ClassScores, "evaluate")
    pairs = read_table(metrics / "near_duplicates.csv", Leak, "split")
    split = read_summary(metrics / "split.json")
    folders = (metrics / "train_head", metrics / "finetune")
    histories = list(map(read_history, folders))
    kept = list(map(read_kept, folders, histories))
    candidates = read_table(folders[0] / "candidates.csv", Candidate, "train_head")
    line = read_table(folders[1] / "line.csv", Point, "finetune")

    make_deterministic(params.seed)
    network, description = load_checkpoint(arguments.finetuned)
    require_classes(arguments.finetuned, description, entries)
    album = Album(Path(params.data.path), entries, description.preprocessing)
    calibrations = read_record(metrics / "calibration.json", Calibrations, "evaluate")
    identical = evaluation.gain.identical
    drawn = replace(predictions, identical=identical)
    by_path = {entry.path: entry for part in every.values() for entry in part}
    alike = [(by_path[one], by_path[other]) for one, other in split["near_duplicates"]]
    figures = {
        "training": draw_training(histories, kept, line),
        "confusion": draw_confusion(drawn),
        "curves": draw_curves(drawn, evaluation.scores),
        "reliability": draw_reliability(drawn, calibrations),
        "coverage": draw_coverage(drawn, calibrations),
        "losses": draw_losses(drawn),
        "wrong": draw_wrong(drawn, album, network),
        "confused": draw_confused(drawn, album),
        "changed": draw_changed(drawn, album),
        "alike": draw_alike(alike, album),
    }
    missing = {name: figure for name, figure in figures.items() if isinstance(figure, str)}
    for name, figure in figures.items():
        (metrics / "figures" / f"{name}.png").unlink(missing_ok=True)
        if not isinstance(figure, str):
            save_figure(metrics / "figures" / f"{name}.png", figure)
    write_curves(metrics / "curves", predictions)
    parts = count_parts(split)
    training = describe_training(histories, kept, params, candidates, line, parts["train"])
    judged = judge_all(predictions, arguments.out_of_fold)
    found = read_table(metrics / "suspects.csv", Suspect, "evaluate")
    suspects = describe_suspects(found, judged, predictions.classes, split)
    out_of_fold = len(judged[0]) - len(entries)
    probabilities = describe_probabilities(calibrations, parts["val"], out_of_fold, identical)
    values = {name: getattr(params, name) for name in RECIPE}
    recipe = {name: value.model_dump() if isinstance(value, Section) else value for name, value in values.items()}
    sentences = (suspects, probabilities, training, describe_losses(drawn))
    page = compose_report(evaluation, classes, split, recipe, pairs, *sentences, missing)
    write_text(metrics / "report.md", page)
    print(describe(evaluation))
    print(f"report in {metrics / 'report.md'}")


if __name__ == "__main__":
    run(main)
