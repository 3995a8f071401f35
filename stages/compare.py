"""All experiments of this repository in one table, the lowest validation log-loss first."""

import argparse
import csv
import json
import sys
from collections.abc import Callable
from typing import Any

from stages.common.cli import StageError, run
from stages.common.commits import find_commit
from stages.common.experiments import Experiment, merge, read_experiments, read_verdict
from stages.common.format import number, percent, plural, points, signed

# How each is shown in the table; CSV has all digits.
COLUMNS: dict[str, Callable[[Any], str]] = {
    "experiment": str,
    "val log-loss": number,
    "test accuracy": percent,
    "gain": points,
    "gain log-loss": signed,
    "verdict": str,
    "made": str,
    "test part": str,
}


DATA = "data.path"


def main() -> None:
    """Print the table, and how often the same test images were looked at."""
    parser = argparse.ArgumentParser(prog="python -m stages.compare", description=__doc__)
    parser.add_argument("--csv", action="store_true", help="as CSV, with a column for each parameter that differs")
    arguments = parser.parse_args()
    found = read_experiments()
    experiments = merge(found)
    if not experiments:
        raise StageError("no experiment here has a result or is queued; make one: dvc exp run -S finetune.lr=1e-4")
    committed = next((one.params for one in found if one.commit == find_commit()), experiments[0].params)
    elsewhere = [one for one in experiments if one.params.get(DATA) != committed.get(DATA)]
    experiments = [one for one in experiments if one not in elsewhere]
    changes = [{key: value for key, value in one.params.items() if committed.get(key) != value} for one in experiments]
    rows = [describe(one) for one in experiments]
    if arguments.csv:
        differing = sorted({key for change in changes for key in change})
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([*COLUMNS, *differing])
        for one, row in zip(experiments, rows, strict=True):
            writer.writerow([*row, *(json.dumps(one.params.get(key)).strip('"') for key in differing)])
        return
    table = [[*COLUMNS, "differs from the last commit in"]]
    for row, change in zip(rows, changes, strict=True):
        cells = [
            value if isinstance(value, str) else "" if value is None else show(value)
            for value, show in zip(row, COLUMNS.values(), strict=True)
        ]
        table.append([*cells, " ".join(f"{key}={json.dumps(value)}" for key, value in change.items()) or "-"])
    columns = [column for column in zip(*table, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for remark in warn(experiments):
        print(remark)
    if elsewhere:
        print(f"{plural(len(elsewhere), 'result')} on images of another {DATA} left out.")


def describe(one: Experiment) -> list[Any]:
    """Return the values of `COLUMNS`; `None` where one is not known."""
    name, gain = ", ".join(one.names), one.evaluation.get("gain", {})
    if one.state != "done":
        return [name, one.state, *[None] * 4, one.made, None]
    accuracy = one.evaluation.get("finetuned", {}).get("accuracy")
    changed = gain.get("accuracy"), gain.get("loss"), read_verdict(one.commit)
    return [name, one.val_loss, accuracy, *changed, one.made, one.part]


def warn(experiments: list[Experiment]) -> list[str]:
    """Say how many different results the same test images gave, and whether all are of the same ones."""
    results: dict[str, set[str]] = {}
    for one in experiments:
        if one.evaluation and one.test is not None:
            results.setdefault(one.test, set()).add(json.dumps(one.evaluation))
    lines = []
    if len(results) > 1:
        lines.append(f"{len(results)} different test parts: compare only rows of the same one.")
    most = max(map(len, results.values()), default=0)
    if most > 1:
        lines.append(
            f"{most} different results on the same test images: a test part looked at fifty times is a validation "
            "part. Choose by the validation log-loss; test on new images what you choose."
        )
    return lines


if __name__ == "__main__":
    run(main)
