"""DVC experiments: running them one after the other, and reading their results from git and DVC's cache."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stages.common.cli import StageError
from stages.common.commits import find_commit, git
from stages.common.params import Params, flatten

Read = TypeVar("Read")

# Written by a run, so a change there does not call for another one.
_WRITTEN = (":!metrics", ":!dvc.lock", ":!data/dvc.lock")


def fingerprint(settings: str, inputs: Iterable[Path]) -> str:
    """Return a short hash of what experiments depend on: commit, uncommitted changes, settings, dates of inputs."""
    digest = hashlib.sha256(
        f"{find_commit()}\n{git('diff', 'HEAD', '--', '.', *_WRITTEN)}\n{settings}\n".encode(errors="surrogateescape")
    )
    for path in inputs:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            status = file.stat()
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:8]


def find_experiment(name: str) -> str | None:
    """Return the commit of the experiment of that name based on the current commit; `None` if there is none."""
    base = find_commit()
    found = git("for-each-ref", "--format=%(objectname)", f"refs/exps/{base[:2]}/{base[2:]}/{name}")
    return found.strip() or None


def run_experiment(name: str, settings: dict[str, object]) -> str:
    """Run the pipeline up to `evaluate` with other parameters in a copy of the repository; return the new commit."""
    options = [option for key, value in settings.items() for option in ("-S", f"{key}={value}")]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--quiet", "--temp", "--name", name, *options, "evaluate"]
    # DVC runs `python`: this one, even if its environment is not activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    process = subprocess.run(command, check=False, env={**os.environ, "PATH": path})
    commit = find_experiment(name)
    if process.returncode != 0 or commit is None:
        shown = " ".join(options)
        raise StageError(f"`dvc exp run {shown}` failed; see above, and run the same command again to go on")
    return commit


def read_result(commit: str, path: str) -> bytes:
    """Return a file of an experiment, from git or from DVC's cache; raises StageError where neither has it."""
    import dvc.api
    from dvc.exceptions import DvcException

    try:
        content: bytes = dvc.api.read(path, rev=commit, mode="rb")
    except (DvcException, OSError) as error:
        raise StageError(
            f"{path} of experiment {commit[:7]} cannot be read ({error}); remove it: dvc exp remove"
        ) from error
    return content


def run_missing(settings: dict[str, dict[str, int]], params: Params) -> dict[str, str]:
    """Run the missing experiments one after the other; return the commit of each, by name."""
    inputs = [Path(params.data.path)]
    inputs += [Path(file) for file in (params.data.labels, params.model.weights) if file and Path(file).is_file()]
    key = fingerprint(str(sorted(next(iter(settings.values())))) + str(len(settings)), inputs)
    commits = {}
    for name, changes in settings.items():
        experiment = f"{name.replace(' ', '-')}-{key}"
        commit = find_experiment(experiment)
        print(f"{name}: {'found' if commit else 'running'} ({experiment})", flush=True)
        commits[name] = commit or run_experiment(experiment, dict(changes))
    return commits


def read_file(commit: str, reader: Callable[[Path], Read], name: str) -> Read:
    """Read a file of an experiment with `reader`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(name).name
        file.write_bytes(read_result(commit, name))
        return reader(file)


TEST, SCORES = "data/index/test.csv", "metrics/scores.json"
RESULT, VALIDATION = "metrics/evaluation.json", "metrics/finetune/metrics.json"


@dataclass
class Experiment:
    """An experiment, or a commit with a result.

    `names`: several if they share one result; `params` by dotted keys; `state`: `done`, or DVC's word for one without a
    result; `evaluation`: the content of `evaluation.json`; `test`: the hash of the test split's index.
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
    """Return the workspace, all experiments, and the commits that changed the result."""
    head = find_commit()
    begun = re.findall(r"^refs/exps/(\w{2})/(\w{38})/", git("for-each-ref", "--format=%(refname)", "refs/exps"), re.M)
    # Queued and failed experiments are in DVC's stashes, whose messages name the commit they are based on.
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
    # The workspace last: a result that is also committed then goes by its commit.
    for base in [*bases, workspace]:
        found.append(parse(base, "done"))
        for each in base["experiments"] or []:
            state = (each["executor"] or {}).get("state", "done").lower()
            # Of an experiment with checkpoints DVC lists all, the latest first.
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
