"""`python -m stages.compare`, as its users call it, on a pipeline of one stage that makes its scores up."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, call_dvc, own_git

from stages.common.experiments import merge, parse

# The validation loss is that of the rate, the accuracy that of the seed, which also decides about the test part.
MAKE = """
import json, pathlib, yaml
params = yaml.safe_load(open("params.yaml"))
lr, seed = params["finetune"]["lr"], params["seed"]
gain = {"accuracy": 0.05, "loss": -0.1, "verdict": "better", "loss_verdict": "no evidence", "identical": False}
evaluation = {"head": {"accuracy": 0.9}, "finetuned": {"accuracy": 0.95 + lr}, "gain": gain}
for name, value in {"finetune/metrics": {"val_loss": 100 * lr}, "evaluation": evaluation, "scores": evaluation}.items():
    path = pathlib.Path(f"metrics/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
pathlib.Path("data/index").mkdir(parents=True, exist_ok=True)
pathlib.Path("data/index/test.csv").write_text(str(seed))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A commit with a result, two experiments on its test part, one on another, and one in the queue."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "make.py").write_text(MAKE)
    in_git = [{f"metrics/{name}.json": {"cache": False}} for name in ("evaluation", "finetune/metrics")]
    stage = {
        "cmd": f"{sys.executable} make.py",
        "deps": ["make.py"],
        "params": ["seed", "finetune"],
        "outs": ["data/index/test.csv", {"metrics/scores.json": {"cache": False}}],
        "metrics": in_git,
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"evaluate": stage}}))
    for command in ("git init -q -b main", "dvc init -q", "dvc repro -q", "git add -A", "git commit -qm 1"):
        run(folder, *command.split())
    experiments = {
        "best": ("finetune.lr=1e-4",),
        "worst": ("finetune.lr=1e-3", "model.framing=pad"),
        "elsewhere": ("seed=7",),
        "other": ("data.path=other", "finetune.lr=0.1"),
        "waiting": ("finetune.lr=0.5",),
    }
    for name, settings in experiments.items():
        options = [option for setting in settings for option in ("-S", setting)] + ["--queue"] * (name == "waiting")
        run(folder, "dvc", "exp", "run", "-q", "-n", name, *options)
        run(folder, "git", "checkout", "-q", ".")
    return folder


def run(folder: Path, program: str, *arguments: str) -> None:
    """Run git or DVC; raises where it fails."""
    if program == "git":
        subprocess.run([program, *arguments], cwd=folder, env=own_git(), check=True)
    else:
        assert call_dvc(folder, own_git(), *arguments)[0] == 0


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.compare", *arguments]
    return subprocess.run(command, cwd=folder, env=own_git(), capture_output=True, text=True, check=False, timeout=200)


def test_the_lowest_validation_loss_comes_first_with_only_what_differs(repository: Path) -> None:
    header, *rows, parts, warning, others = compare(repository).stdout.splitlines()
    cells = [row.split("  ")[0] for row in rows]
    assert cells[0] == "best"
    assert cells[-2:] == ["worst", "waiting"]
    assert set(cells) == {"best", "main", "elsewhere", "worst", "waiting"}
    by_name = dict(zip(cells, rows, strict=True))
    assert by_name["best"].split("  ")[-1] == "finetune.lr=0.0001"
    assert by_name["main"].endswith(" -")
    assert by_name["worst"].endswith('  model.framing="pad" finetune.lr=0.001')
    assert by_name["elsewhere"].endswith("  seed=7")
    for shown in ("0.0100", "95.01%", "+5.00 points", "-0.1000", "better, no evidence"):
        assert shown in by_name["best"]
    assert by_name["waiting"].split()[1] == "queued"
    assert "split.test_size" not in header + "".join(rows)
    assert parts.startswith("2 different test parts")
    assert warning.startswith("3 different results on the same test images")
    assert others == "1 result on images of another data.path left out."


def test_csv_has_all_digits_and_a_column_for_each_parameter_that_differs(repository: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(compare(repository, "--csv").stdout)))
    by_name = {row["experiment"]: row for row in rows}
    assert float(by_name["best"]["test accuracy"]) == 0.95 + 1e-4
    assert [key for key in rows[0] if "." in key or key == "seed"] == ["finetune.lr", "model.framing", "seed"]
    assert (by_name["worst"]["model.framing"], by_name["best"]["model.framing"]) == ("pad", "null")
    assert by_name["elsewhere"]["test part"] != by_name["best"]["test part"] == by_name["worst"]["test part"]


def test_a_failed_experiment_is_listed_without_scores_and_the_same_result_once() -> None:
    def revision(name: str, **data: object) -> dict[str, object]:
        params = {"params.yaml": {"data": {"seed": 42}}}
        return {"name": name, "rev": name * 8, "data": {"timestamp": None, "params": params, "outs": {}, **data}}

    scores = {"data": {"finetuned": {"accuracy": 0.9}}}
    failed = parse(revision("bad", metrics={"metrics/evaluation.json": {"error": {"msg": "no such file"}}}), "failed")
    done = [parse(revision(name, metrics={"metrics/evaluation.json": scores}), "done") for name in ("one", "two")]
    assert parse(revision("none", metrics={}), "done") is None
    experiments = merge([one for one in (failed, *done) if one is not None])
    assert {tuple(one.names): one.state for one in experiments} == {("bad",): "failed", ("one", "two"): "done"}
    assert failed is not None
    assert json.dumps(failed.evaluation) == "{}"


def test_without_git_or_experiments_it_is_one_line(tmp_path: Path) -> None:
    nowhere = compare(tmp_path)
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (1, 1)
    assert "experiments need git with a commit" in nowhere.stderr
    for command in ("git init -q", "git commit -q --allow-empty -m 1"):
        run(tmp_path, *command.split())
    without_dvc = compare(tmp_path)
    assert (without_dvc.returncode, without_dvc.stderr.count("\n")) == (1, 1)
    assert "`dvc exp show` failed: you are not inside of a DVC repository" in without_dvc.stderr
    run(tmp_path, "dvc", "init", "-q")
    empty = compare(tmp_path)
    assert empty.stderr == (
        "error: no experiment here has a result or is queued; make one: dvc exp run -S finetune.lr=1e-4\n"
    )
