"""All experiments of this repository in one table, the lowest validation log-loss first."""

import argparse
import csv
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.cli import StageError, run
from stages.common.experiments import find_commit, git
from stages.common.format import number, percent, points, signed

TEST, SCORES = "data/index/test.csv", "metrics/scores.json"
RESULT, VALIDATION = "metrics/evaluation.json", "metrics/finetune/metrics.json"
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


@dataclass
class Experiment:
    """An experiment, or a commit with a result.

    `names`: more than one where the same result has several; `params` by dotted keys; `state`: `done`, or what DVC says
    of one without a result; `evaluation`: the content of `evaluation.json`; `test`: the hash of the test part's index.
    """

    names: list[str]
    commit: str
    made: str
    state: str
    params: dict[str, Any]
    val_loss: float | None
    evaluation: dict[str, Any]
    test: str | None
    part: str = ""


def main() -> None:
    """Print the table, and how often the same test pictures were looked at."""
    parser = argparse.ArgumentParser(prog="python -m stages.compare", description=__doc__)
    parser.add_argument("--csv", action="store_true", help="as CSV, with a column for each parameter that differs")
    arguments = parser.parse_args()
    found = read_experiments()
    experiments = merge(found)
    if not experiments:
        raise StageError("no experiment here has a result or is queued; make one: dvc exp run -S finetune.lr=1e-4")
    committed = next((one.params for one in found if one.commit == find_commit()), experiments[0].params)
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


def read_experiments() -> list[Experiment]:
    """Return the workspace, all experiments, and the commits that changed the result.

    Raises:
        StageError: no git or DVC repository.
    """
    head = find_commit()
    begun = re.findall(r"^refs/exps/(\w{2})/(\w{38})/", git("for-each-ref", "--format=%(refname)", "refs/exps"), re.M)
    # Those that are queued or have failed are in DVC's stashes, whose messages name the commit that they begin from.
    stashes = git("log", "--walk-reflogs", "--format=%gs", "--glob=refs/exps/celery/*")
    commits = [head, *map("".join, begun), *re.findall(r":(\w{40})(?::|$)", stashes, re.M)]
    commits += git("log", "--format=%H", "--", RESULT).split()
    revisions = [option for commit in dict.fromkeys(commits) for option in ("--rev", commit)]
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", *revisions]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        said = process.stderr.strip().splitlines() or ["it says nothing"]
        raise StageError(f"`dvc exp show` failed: {said[0].removeprefix('ERROR: ')}")
    found = []
    workspace, *bases = json.loads(process.stdout)
    # Last: what is also committed is then known by its commit.
    for base in [*bases, workspace]:
        found.append(parse(base, "done"))
        for each in base["experiments"] or []:
            state = (each["executor"] or {}).get("state", "done").lower()
            # Of an experiment with checkpoints, DVC lists all; the first is the last one made.
            found += [parse(revision, state) for revision in (each["revs"] or [])[:1]]
    return [one for one in found if one is not None]


def parse(revision: dict[str, Any], state: str) -> Experiment | None:
    """Read what `dvc exp show --json` says of a revision; `None` of a commit or a workspace without a result."""
    data = revision["data"] or {}
    metrics = {path: (about or {}).get("data") or {} for path, about in (data.get("metrics") or {}).items()}
    evaluation = metrics.get(RESULT, {}) if state in ("done", "success") else {}
    if not evaluation and state in ("done", "success"):
        return None
    commit = revision["rev"]
    name = revision["name"] or (commit if commit == "workspace" else commit[:7])
    params = flatten(
        {key: value for file in (data.get("params") or {}).values() for key, value in file["data"].items()}
    )
    test = (data["outs"].get(TEST) or {}).get("hash") if data.get("outs") else None
    val_loss = metrics.get(VALIDATION, {}).get("val_loss") if evaluation else None
    made = (data.get("timestamp") or "")[:16].replace("T", " ")
    return Experiment([name], commit, made, "done" if evaluation else state, params, val_loss, evaluation, test)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def merge(found: list[Experiment]) -> list[Experiment]:
    """Return what was found, the same result of the same parameters once; sorted, with letters for the test parts."""
    once: dict[str, Experiment] = {}
    for one in found:
        key = json.dumps([one.params, one.evaluation, one.test, one.commit if one.state != "done" else ""])
        first = once.setdefault(key, one)
        first.names += [name for name in one.names if name not in (*first.names, "workspace")]
    experiments = sorted(once.values(), key=lambda one: math.inf if one.val_loss is None else one.val_loss)
    tests = list(dict.fromkeys(one.test for one in experiments if one.test is not None))
    for one in experiments:
        one.part = str(tests.index(one.test) + 1) if one.test is not None and len(tests) > 1 else ""
    return experiments


def describe(one: Experiment) -> list[Any]:
    """Return the values of `COLUMNS`; `None` where one is not known."""
    name, gain = ", ".join(one.names), one.evaluation.get("gain", {})
    if one.state != "done":
        return [name, one.state, *[None] * 4, one.made, None]
    accuracy = one.evaluation.get("finetuned", {}).get("accuracy")
    changed = gain.get("accuracy"), gain.get("loss"), read_verdict(one.commit)
    return [name, one.val_loss, accuracy, *changed, one.made, one.part]


def read_verdict(commit: str) -> str:
    """Return the verdicts on accuracy and on probabilities, which are in `scores.json` only; empty where it is not."""
    try:
        text = Path(SCORES).read_text(encoding="utf-8") if commit == "workspace" else git("show", f"{commit}:{SCORES}")
        gain = json.loads(text)["gain"]
        if gain["identical"]:
            return "same network"
        return f"{gain['verdict']}, {gain['loss_verdict']}" if gain["verdict"] else "none: watched the test"
    except (StageError, OSError, ValueError, KeyError):
        return ""


def warn(experiments: list[Experiment]) -> list[str]:
    """Say how many different results the same test pictures gave, and whether all are of the same ones."""
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
            f"{most} different results on the same test pictures: a test part looked at fifty times is a validation "
            "part. Choose by the validation log-loss; test on new pictures what you choose."
        )
    return lines


if __name__ == "__main__":
    run(main)
