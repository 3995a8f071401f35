"""All experiments of this repository, as `dvc exp show` and git know them."""

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.cli import StageError
from stages.common.commits import find_commit, git
from stages.common.params import flatten

TEST, SCORES = "data/index/test.csv", "metrics/scores.json"
RESULT, VALIDATION = "metrics/evaluation.json", "metrics/finetune/metrics.json"


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
