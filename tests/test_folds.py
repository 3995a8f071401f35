"""`python -m stages.folds`, as its users call it, on a pipeline of one stage that makes predictions up."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, call_dvc, make_images, own_git

from stages import folds as stages_folds
from stages.common import experiments
from stages.common.cli import run
from stages.scores.predictions import Predictions

# Each fold tests its own images; with a file `broken` there, fold 1 fails.
MAKE = """
import json, pathlib, sys, yaml
import numpy as np
params = yaml.safe_load(open("params.yaml"))
fold, seed = params["split"]["fold"], params["seed"]
if fold == 1 and pathlib.Path(sys.argv[1], "broken").exists():
    sys.exit("error: no luck")
pathlib.Path("metrics").mkdir(exist_ok=True)
labels, every = np.arange(10) % 2, np.arange(10)
head, finetuned = (
    np.where((labels[:, None] == [0, 1]) == (every % n != 0)[:, None], 0.8, 0.2) for n in (5, 7 + fold + seed % 2)
)
paths = [f"{('cat', 'dog')[label]}/{10 * fold + number:03d}.png" for number, label in enumerate(labels)]
pathlib.Path("data").mkdir(exist_ok=True)
np.savez("data/predictions.npz", paths=paths, labels=labels, classes=["cat", "dog"], head=head, finetuned=finetuned)
counts = {"train": 20, "val": 0 if params["split"]["val_size"] == 0 else 2, "test": 10}
split = {"classes": {"cat": counts}, "rejected": [], "duplicates": [], "notes": []}
pathlib.Path("metrics/split.json").write_text(json.dumps(split))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    images = make_images(tmp_path / "images", count=15)
    folder.mkdir()
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["data"]["path"] = str(images)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "make.py").write_text(MAKE)
    stage = {
        "cmd": f"{sys.executable} make.py {tmp_path}",
        "deps": ["make.py"],
        "params": ["seed", "split"],
        "outs": [
            "data/predictions.npz",
            {"metrics/split.json": {"cache": False}},
        ],
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"evaluate": stage}}))
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "1"]):
        if command[0] == "dvc":
            assert call_dvc(folder, own_git(), *command[1:])[0] == 0
        else:
            subprocess.run(command, cwd=folder, env=own_git(), check=True)
    return folder


def folds(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # As where the environment is not activated: neither `dvc` nor this `python` is in the path.
    command, environment = [sys.executable, "-m", "stages.folds", *arguments], own_git(PATH=os.defpath)
    return subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False, timeout=200
    )


def test_stopped_folds_continue_and_end_in_one_result(repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("")
    stopped = folds(repository, "--folds", "2")
    assert stopped.returncode == 1
    assert stopped.stderr.splitlines()[-1].startswith("error: `dvc exp run -S split.folds=2 -S split.fold=1` failed")
    assert "error: no luck" in stopped.stderr

    broken.unlink()
    finished = folds(repository, "--folds", "2")
    assert finished.returncode == 0, finished.stderr
    assert [line.split()[2] for line in finished.stdout.splitlines()[:2]] == ["found", "running"]
    together = json.loads((repository / "metrics/folds.json").read_text())
    assert [run["name"] for run in together["runs"]] == ["fold 0", "fold 1"]
    gain = together["gain"]
    assert (together["images"], gain["fixed"], gain["broken"]) == (20, 2, 2)
    with (repository / "metrics/folds/suspects.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    page = (repository / "metrics/folds/README.md").read_text()
    assert finished.stdout.splitlines()[-3] in page
    # The user's own files are as they were.
    status = subprocess.run(["git", "status", "--short"], cwd=repository, capture_output=True, text=True, check=True)
    assert status.stdout.split() == ["??", "metrics/"]


@pytest.mark.slow
def test_seeds_are_compared_on_one_split(repository: Path) -> None:
    finished = folds(repository, "--seeds", "42, 43")
    assert finished.returncode == 0, finished.stderr
    assert "2 seeds on the same 10 test images" in finished.stdout
    together = json.loads((repository / "metrics/folds.json").read_text())
    assert [run["name"] for run in together["runs"]] == ["seed 42", "seed 43"]
    assert together["gain"]["verdict"] is None


@pytest.mark.parametrize(("grouped", "val"), [(True, 2), (False, 0)])
def test_remarks_of_the_splits_reach_the_verdict(monkeypatch: pytest.MonkeyPatch, grouped: bool, val: int) -> None:
    labels = np.arange(40) % 2
    right, wrong = np.eye(2)[labels] * 0.6 + 0.2, 0.8 - np.eye(2)[labels] * 0.6
    head = np.where(np.arange(40)[:, None] < 8, wrong, right)
    runs = {f"fold {fold}": Predictions([f"{fold}/{number}.png" for number in range(40)], labels, ["cat", "dog"],
                                        head, right) for fold in range(2)}  # fmt: skip
    rows = "".join(f"0/{number}.png,{number % 2},x,{number},scene {number // 8}\n" for number in range(40))
    split = {"classes": {"x": {"train": 40, "val": val, "test": 40}}, "rejected": [], "duplicates": [], "notes": []}
    files = {
        "metrics/split.json": lambda _: json.dumps(split),
        "data/index/test.csv": lambda fold: "path,label,class,sha256,group\n" + rows.replace("scene", f"{fold} scene"),
    }
    monkeypatch.setattr(experiments, "read_result", lambda commit, name: files[name](commit).encode())
    gain = stages_folds.combine(runs, ["a", "b"], grouped).gain
    assert (gain.groups, gain.verdict) == ((10, "no evidence") if grouped else (None, None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folds", "1"], "--folds: should be 2 or more, is 1"),
        (["--seeds", "42"], "--seeds: should be two or more numbers"),
        (["--seeds", "42,x"], "--seeds: should be two or more numbers"),
        (["--params", "none.yaml"], "none.yaml"),
        ([], "git rev-parse failed: experiments need git with a commit"),
    ],
)
def test_folds_that_cannot_run_are_refused_in_one_line(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["folds", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        run(stages_folds.main)
    assert exit_info.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
