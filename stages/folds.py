"""All folds of the images, or several seeds, as experiments of DVC: does fine-tuning help, over all of them?"""

import argparse
from pathlib import Path

from stages.common.cli import StageError, run
from stages.common.experiments import read_file, run_missing
from stages.common.files import write_record, write_table, write_text
from stages.common.params import load_params
from stages.images.index import PARTS, class_counts, count_once, number_groups, read_index, read_summary
from stages.report.page import compose_runs
from stages.scores.folds import Together, combine_folds, combine_seeds, describe_folds, describe_seeds, join
from stages.scores.predictions import Predictions, read_predictions
from stages.scores.suspects import Suspect, estimate_wrong_labels, find_suspects

FOLDS = 5
PREDICTIONS, SPLIT, INDEX = "data/predictions.npz", "metrics/split.json", "data/index/test.csv"


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
        commits = run_missing(settings, params)
        runs = {name: read_file(commit, read_predictions, PREDICTIONS) for name, commit in commits.items()}
        together = combine(runs, list(commits.values()), grouped=params.split.group is not None)
        print(describe_folds(together))
        pooled = join(list(runs.values()))
        wrong = estimate_wrong_labels(pooled.labels, pooled.finetuned)
        suspects = find_suspects(pooled.paths, pooled.labels, pooled.finetuned, pooled.classes)
        write_table(arguments.output / "suspects.csv", Suspect, suspects)
        print(f"about {wrong:.0f} of {len(pooled.paths):,} labels may be wrong: {arguments.output}/suspects.csv")
        page = compose_runs("folds", together, describe_folds(together), wrong, suspects)
    else:
        own = params.seed if params.split.seed is None else params.split.seed
        seeds = read_seeds(arguments.seeds)
        commits = run_missing({f"seed {seed}": {"split.seed": own, "seed": seed} for seed in seeds}, params)
        together = combine_seeds(
            {name: read_file(commit, read_predictions, PREDICTIONS) for name, commit in commits.items()}
        )
        print(describe_seeds(together))
        page = compose_runs("seeds", together, describe_seeds(together), None, [])
    write_record(arguments.output.with_suffix(".json"), together)
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


def combine(runs: dict[str, Predictions], commits: list[str], grouped: bool) -> Together:
    """Put the runs of all folds together, with what their splits say."""
    counts = [each for commit in commits for each in class_counts(read_file(commit, read_summary, SPLIT)).values()]
    train, val, test = (sum(each[part] for each in counts) for part in PARTS)
    tested = [count_once(read_file(commit, read_index, INDEX)) for commit in commits] if grouped else []
    groups = number_groups([entry for entries in tested for entry in entries])
    return combine_folds(runs, test / train, groups, watched=not val)


if __name__ == "__main__":
    run(main)
