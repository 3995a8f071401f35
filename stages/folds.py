"""All folds of the pictures, or several seeds, as experiments of DVC: does fine-tuning help, over all of them?"""

import argparse
import tempfile
from pathlib import Path

from stages.common.experiments import find_experiment, fingerprint, read_result, run_experiment
from stages.common.files import write_text
from stages.common.params import Params, load_params
from stages.common.stage import StageError, run
from stages.report.folds import compose_page, draw_runs, draw_suspects
from stages.report.style import save_figure
from stages.scores.folds import combine_folds, combine_seeds, describe_folds, describe_seeds, join, write_together
from stages.scores.predictions import Predictions, read_predictions
from stages.scores.suspects import estimate_wrong_labels, find_suspects, write_suspects

FOLDS = 5
PREDICTIONS, PROBABILITIES = "metrics/predictions.csv", "data/predictions.npz"


def main() -> None:
    """Run what is missing, put all together, and write it."""
    parser = argparse.ArgumentParser(prog="python -m stages.folds", description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--output", type=Path, default=Path("metrics/folds"), help="folder, and beside it a .json")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--folds", type=int, help=f"number; default: split.folds, or {FOLDS}")
    which.add_argument("--seeds", help="in place of folds, one split and these seeds: 42,43,44")
    arguments = parser.parse_args()
    params = load_params(arguments.params)

    if arguments.seeds is None:
        count = arguments.folds or params.split.folds or FOLDS
        if count < 2:
            raise StageError(f"--folds: should be 2 or more, is {count}")
        settings = {f"fold {fold}": {"split.folds": count, "split.fold": fold} for fold in range(count)}
        runs = run_all(settings, params)
        together = combine_folds(runs, find_ratio(params, count))
        print(describe_folds(together))
        pooled = join(list(runs.values()))
        wrong = estimate_wrong_labels(pooled.labels, pooled.finetuned)
        suspects = find_suspects(pooled.paths, pooled.labels, pooled.finetuned, pooled.classes)
        write_suspects(arguments.output / "suspects.csv", suspects)
        save_figure(arguments.output / "suspects.png", draw_suspects(suspects, Path(params.data.path)))
        print(f"about {wrong:.0f} of {len(pooled.paths):,} labels may be wrong: {arguments.output}/suspects.csv")
        page = compose_page("folds", together, describe_folds(together), wrong, suspects)
    else:
        own = params.seed if params.split.seed is None else params.split.seed
        seeds = read_seeds(arguments.seeds)
        runs = run_all({f"seed {seed}": {"split.seed": own, "seed": seed} for seed in seeds}, params)
        together = combine_seeds(runs)
        print(describe_seeds(together))
        page = compose_page("seeds", together, describe_seeds(together), None, [])
    write_together(arguments.output.with_suffix(".json"), together)
    save_figure(arguments.output / "gain.png", draw_runs(together))
    write_text(arguments.output / "README.md", page)
    print(f"written to {arguments.output}.json and {arguments.output}/")


def read_seeds(text: str) -> list[int]:
    """Read `42,43,44`.

    Raises:
        StageError: it is something else, or fewer than two seeds.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < 2:
        raise StageError(f"--seeds: should be two or more numbers such as 42,43,44, is {text!r}")
    return [int(part) for part in dict.fromkeys(parts)]


def run_all(settings: dict[str, dict[str, int]], params: Params) -> dict[str, Predictions]:
    """Run the experiments that are missing, one after the other; by name, the predictions of all.

    Raises:
        StageError: one failed.
    """
    inputs = [Path(params.data.path)]
    inputs += [Path(file) for file in (params.data.labels, params.model.weights) if file and Path(file).is_file()]
    key = fingerprint(str(sorted(next(iter(settings.values())))) + str(len(settings)), inputs)
    predictions = {}
    for name, changes in settings.items():
        experiment = f"{name.replace(' ', '-')}-{key}"
        commit = find_experiment(experiment)
        print(f"{name}: {'found' if commit else 'running'} ({experiment})", flush=True)
        predictions[name] = read_run(commit or run_experiment(experiment, dict(changes)))
    return predictions


def read_run(commit: str) -> Predictions:
    """Return the predictions of an experiment."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / Path(name).name for name in (PREDICTIONS, PROBABILITIES)]
        for name, file in zip((PREDICTIONS, PROBABILITIES), files, strict=True):
            file.write_bytes(read_result(commit, name))
        return read_predictions(*files)


def find_ratio(params: Params, folds: int) -> float:
    """Return how many test pictures there are for each training picture."""
    return (1 / folds) / (1 - 1 / folds - params.split.val_size)


if __name__ == "__main__":
    run(main)
