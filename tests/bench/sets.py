"""Compare methods on every set of images in a folder, over seeds: this pipeline, scikit-learn, a tutorial's, fastai.

Each folder in DIR that has images is a set. All methods share its split: the tutorial's loop, fastai and the first
regression train on its training images; both networks of the pipeline and the second regression choose or fit by its
validation images, too. Seconds are those of whole processes, from a cold cache and imports included: the head's are
`split`, `build_model` and `train_head`; the fine-tuned network's are these and `finetune`; the regressions' are
features, the choice of C by folds, and the fit.

A result is a row of `sets.csv` as soon as there is one; the same command goes on where it was stopped.
"""

import argparse
import importlib.util
import signal
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from torchvision.datasets.folder import IMG_EXTENSIONS

sys.path.insert(0, str(Path(__file__).parents[2]))

from stages.common.cli import StageError
from stages.common.cli import run as run_main
from stages.common.commits import git
from stages.common.files import read_table, sha256_of, write_table
from stages.network.backbones import stock_shapes
from tests.bench.project import BENCH, MEASURES, ROOT, Project, class_folders, run
from tests.bench.sets_report import Result, draw, tabulate

# The tutorial's, of each phase.
EPOCHS = 5


def measure_pipeline(project: Project, prepared: float) -> dict[str, dict[str, Any]]:
    """Run both phases."""
    head = prepared + project.run("train_head").seconds
    seconds = {"head": head, "finetuned": head + project.run("finetune").seconds}
    project.run("evaluate")
    scores = project.read("metrics/scores.json")
    measured: dict[str, dict[str, Any]] = {
        method: {"seconds": own, **{name: scores[method][name] for name in MEASURES}} for method, own in seconds.items()
    }
    measured["finetuned"] |= {name: scores["gain"][name] for name in ("verdict", "loss_verdict")}
    return measured


def measure_logistic(project: Project, _: float) -> dict[str, dict[str, Any]]:
    """Fit both regressions; each takes as long as all but the fit of the other."""
    both = run(project.folder, BENCH / "logistic.py")
    report = both.json()
    fits = sum(own["seconds"] for own in report.values())
    return {method: {**own, "seconds": both.seconds - fits + own["seconds"]} for method, own in report.items()}


def measure_tutorial(project: Project, _: float) -> dict[str, dict[str, Any]]:
    """Run the tutorial's loop."""
    tutorial = project.run_tutorial(EPOCHS)
    report = tutorial.json()
    return {"tutorial": {**report["finetuned"], "seconds": tutorial.seconds - report["scoring"]}}


def measure_fastai(project: Project, _: float) -> dict[str, dict[str, Any]]:
    """Run fastai's `fine_tune`."""
    tuned = run(project.folder, BENCH / "fastai_tune.py", "--epochs", str(EPOCHS))
    return {method: {**own, "seconds": tuned.seconds} for method, own in tuned.json().items()}


JOBS = {
    "pipeline": (measure_pipeline, {"head", "finetuned"}),
    "sklearn": (measure_logistic, {"sklearn", "sklearn, train+val"}),
    "tutorial": (measure_tutorial, {"tutorial"}),
    "fastai": (measure_fastai, {"fastai"}),
}


def measure(options: argparse.Namespace, sets: list[Path], seeds: range) -> list[Result]:
    """Compute the results that `sets.csv` does not have, one set and seed after the other, and return all of these."""
    path, weights = options.output / "sets.csv", "random"
    if options.weights is not None:
        weights = f"{options.weights.name} {sha256_of(options.weights)[:12]}"
    settings = {"arch": options.arch, "weights": weights, "image_size": options.image_size}
    results, commit = read_results(path, settings), find_commit()
    for folder, seed in product(sets, seeds):
        done = {result.method for result in results if (result.set, result.seed) == (folder.name, seed)}
        wanted = [JOBS[name] for name in options.methods]
        missing = [job for job, methods in wanted if not done.issuperset(methods)]
        if not missing:
            continue
        print(f"{folder.name}, seed {seed}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            project = Project(Path(scratch))
            project.set("seed", seed)
            project.set("data", path=str(folder.resolve()))
            own = None if options.weights is None else str(options.weights)
            project.set("model", arch=options.arch, weights=own, image_size=options.image_size)
            prepared = sum(project.run(stage).seconds for stage in ("split", "build_model"))
            about = {**project.read("metrics/split.json")["parts"], **settings, "commit": commit}
            for job in missing:
                measured = job(project, prepared).items()
                results += [Result(folder.name, seed, method, **values, **about) for method, values in measured]
                write_table(path, Result, results)
    names = {folder.name for folder in sets}
    return [result for result in results if result.set in names and result.seed in seeds]


def read_results(path: Path, settings: dict[str, object]) -> list[Result]:
    """Read the results that there are.

    Raises:
        StageError: they were made with other settings, or by another version of this script.
    """
    if not path.exists():
        return []
    try:
        results = read_table(path, Result, "")
    except StageError as error:
        raise StageError(f"{path}: not a table of this version; give another --output") from error
    for result, (name, value) in product(results, settings.items()):
        if (made := getattr(result, name)) != value:
            raise StageError(f"{path}: made with {name} {made}, not {value}; give another --output")
    return results


def find_commit() -> str:
    """Return the commit of this code, with `-dirty` where it was changed since."""
    try:
        return git("describe", "--always", "--dirty", "--exclude=*", folder=ROOT).strip()
    except StageError:
        return "unknown"


def main() -> None:
    """Measure what is missing, draw, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True, metavar="DIR", help="a folder of sets of images")
    parser.add_argument("--arch", default="mobilenet_v3_large", help="a network of torchvision's")
    parser.add_argument("--weights", required=True, help="a file, or null: random")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    has_fastai = importlib.util.find_spec("fastai") is not None
    there = [name for name in JOBS if has_fastai or name != "fastai"]
    parser.add_argument("--methods", nargs="+", choices=there, default=there, help="fastai: where it is installed")
    parser.add_argument("--output", type=Path, default=ROOT / "exported" / "bench", help="for sets.csv and sets.png")
    options = parser.parse_args()
    options.weights = None if options.weights == "null" else Path(options.weights).resolve()
    for name, wanted in (("sets", options.sets), ("weights", options.weights)):
        if wanted is not None and not wanted.exists():
            parser.error(f"--{name}: {wanted}: not found")
    if options.seeds < 1:
        parser.error("--seeds: give 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not hasattr(stock_shapes(options.arch, options.image_size), "features"):
        raise StageError(f"--arch: {options.arch}: torchvision's has no `features`, which the tutorial's loop trains")
    sets = [folder for folder in class_folders(options.sets) if has_images(folder)]
    if not sets:
        raise StageError(f"--sets: {options.sets}: no folder in it has images")
    first = yaml.safe_load((ROOT / "params.yaml").read_text())["seed"]
    results = measure(options, sets, range(first, first + options.seeds))
    draw(options.output / "sets.png", results)
    print("\n".join(tabulate(results)))


def has_images(folder: Path) -> bool:
    """Say whether there is an image somewhere in a folder."""
    return any(path.suffix.lower() in IMG_EXTENSIONS for path in folder.rglob("*"))


if __name__ == "__main__":
    run_main(main)
