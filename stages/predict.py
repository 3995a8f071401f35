"""What the finished network says of new images: files and folders -> a table of predictions."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from stages.common.cli import StageError, run
from stages.common.device import make_deterministic
from stages.common.format import plural
from stages.common.machine import resolve_workers, reuse_freed_memory
from stages.common.params import Precision
from stages.deploy.classifier import find_files, load, open_classifier
from stages.scores.predictions import open_table

_REJECT = (
    "predict nothing below this probability, nor where `unlike` is above 1: farther from the training images than "
    "99%% of validation images"
)


def main() -> None:
    """Predict the class of each image; an image that cannot be read has a row that says why."""
    parser = argparse.ArgumentParser(prog="python -m stages.predict", description=__doc__)
    parser.add_argument("images", type=Path, nargs="+", help="files, and folders at any depth")
    parser.add_argument("--output", default="predictions.csv", help=".csv or .jsonl; - for the standard output")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("data/checkpoints/finetuned.safetensors"),
        help=".safetensors, or .onnx as `stages.export` writes",
    )
    parser.add_argument("--top", type=int, default=3, help="classes with their probabilities; default: 3")
    parser.add_argument("--all", action="store_true", help="the probability of every class")
    parser.add_argument("--reject", type=float, default=0.0, help=_REJECT)
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, help="decoding processes; default: one a core")
    arguments = parser.parse_args()
    for name, value in (("--top", arguments.top), ("--batch-size", arguments.batch_size)):
        if value < 1:
            raise StageError(f"{name}: should be 1 or more, is {value}")
    if not 0 <= arguments.reject <= 1:
        raise StageError(f"--reject: should be a probability from 0 to 1, is {arguments.reject:g}")
    if not (folder := Path(arguments.output).parent).is_dir():
        raise StageError(f"--output: there is no folder {folder}; make it first")

    paths, others = find_files(arguments.images)
    make_deterministic(0)
    reuse_freed_memory()
    classifier = open_classifier(arguments.checkpoint, arguments.device, arguments.precision)
    workers = resolve_workers("auto" if arguments.workers is None else arguments.workers)
    top, unreadable = None if arguments.all else arguments.top, 0
    with (
        open_table(arguments.output, classifier.classes, top, arguments.reject, classifier.tells_unlike) as write,
        tqdm(total=len(paths), desc="predicting", unit=" images", disable=None) as progress,
    ):
        for some in load(paths, classifier, arguments.batch_size, workers):
            answers = zip(*classifier.predict(some.images), strict=True) if len(some.images) else iter(())
            for path, problem in zip(some.paths, some.problems, strict=True):
                write(path, *(next(answers) if problem is None else (problem, 0.0)))
                unreadable += problem is not None
            progress.update(len(some.paths))
    left = f"; {plural(others, 'other file')} left out" if others else ""
    print(f"{plural(len(paths) - unreadable, 'image')} predicted{left}", file=sys.stderr)
    if unreadable:
        raise StageError(
            f"{unreadable} of {len(paths)} images cannot be read; `problem` in {arguments.output} says why"
        )


if __name__ == "__main__":
    run(main)
