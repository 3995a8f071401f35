"""`dvc.yaml` against what each stage reads and imports, and what runs again, through DVC itself."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, STAGES, make_pictures
from PIL import Image
from torchvision.models import mobilenet_v3_small

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
DATA_PIPELINE = yaml.safe_load((ROOT / "data" / "dvc.yaml").read_text())
# They say where to compute, not what.
UNTRACKED = {"device", "workers"}
# Only refused here if it is out of range; no output depends on it.
CHECKED_EARLY = {"build_model": {"finetune.unfreeze"}}


def imports(path: Path) -> set[Path]:
    """The project's own modules that a module imports, directly or not."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("stages"):
            continue
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
            module = ROOT / f"{str(name).replace('.', '/')}.py"
            if module.is_file():
                found |= {module} | imports(module)
    return found


def parameters_read(path: Path) -> set[str]:
    """The longest chains of attributes that a stage takes from `params`."""
    chains: set[str] = set()
    tree = ast.parse(path.read_text())
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "params" and isinstance(node.ctx, ast.Load):
            assert node in inner, "params is handed on whole"
        if isinstance(node, ast.Attribute) and node not in inner:
            chain = ast.unparse(node)
            if chain.startswith("params."):
                chains.add(chain.removeprefix("params."))
    return chains


def covered(key: str, declared: set[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in declared)


def test_there_are_exactly_the_six_stages() -> None:
    assert tuple(PIPELINE["stages"]) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_each_module_that_it_imports(stage: str) -> None:
    script = ROOT / "stages" / f"{stage}.py"
    needed = {path.relative_to(ROOT).as_posix() for path in {script} | imports(script)}
    declared = {dep for dep in PIPELINE["stages"][stage]["deps"] if dep.startswith("stages/")}
    assert declared == needed


def test_the_stages_under_data_depend_on_each_module_that_they_import() -> None:
    for stage, script in (("weights", "data/link_weights.py"), ("digits", "data/digits/make.py")):
        needed = {path.relative_to(ROOT).as_posix() for path in {ROOT / script} | imports(ROOT / script)}
        assert set(DATA_PIPELINE["stages"][stage]["deps"]) == needed


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_exactly_the_parameters_that_it_declares(stage: str) -> None:
    read = parameters_read(ROOT / "stages" / f"{stage}.py") - UNTRACKED - CHECKED_EARLY.get(stage, set())
    declared = set(PIPELINE["stages"][stage].get("params", []))
    assert not {key for key in read if not covered(key, declared)}
    assert not {name for name in declared if not any(covered(key, {name}) for key in read)}


@pytest.mark.parametrize("stage", STAGES)
def test_every_path_of_a_command_is_declared(stage: str) -> None:
    entry = PIPELINE["stages"][stage]
    declared = [*entry["deps"], *entry.get("params", [])]
    for kind in ("outs", "metrics", "plots"):
        declared += [item if isinstance(item, str) else next(iter(item)) for item in entry.get(kind, [])]
    for word in entry["cmd"].split():
        if "/" in word:
            assert any(name == word or name.startswith((f"{word}/", f"{word}.")) for name in declared), word


def test_no_stage_imports_another_and_common_imports_no_stage() -> None:
    for path in (ROOT / "stages").rglob("*.py"):
        for module in imports(path):
            assert module.parent.name == "common", f"{path} imports {module}"


def test_a_stage_script_is_a_page() -> None:
    for stage in STAGES:
        assert len((ROOT / "stages" / f"{stage}.py").read_text().splitlines()) <= 80


class Repository:
    """A copy of the project in a git repository of its own, with tiny pictures and a weight file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bin_folder = Path(sys.executable).parent
        self.environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
        self.environment |= {
            f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, folder / name)
        for name in (".dvc", "stages", "data"):
            ignore = shutil.ignore_patterns("__pycache__", "images", "index", "checkpoints", "weights", "cache", "tmp")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        for lock in folder.rglob("dvc.lock"):
            lock.unlink()
        make_pictures(folder / "my pictures", count=12)
        torch.save(mobilenet_v3_small().state_dict(), folder / "weights.pth")
        (folder / ".gitignore").open("a").write("/my pictures\n/weights.pth\n")
        self.git("init", "--quiet")
        self.commit()

    def git(self, *arguments: str) -> str:
        return self.call("git", *arguments)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "state")

    def call(self, *command: str, expect: int = 0) -> str:
        process = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert process.returncode == expect, process.stdout + process.stderr
        return process.stdout + process.stderr

    def ran(self, *command: str) -> list[str]:
        """Call, and return the stages that were run."""
        output = self.call(*command)
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]

    def run_experiment(self, **params: object) -> list[str]:
        settings = (f"--set-param={key}={value}" for key, value in params.items())
        return self.ran("dvc", "exp", "run", *settings)


def settings(**more: object) -> dict[str, object]:
    phases = {f"{phase}.{key}": value for phase in ("train_head", "finetune") for key, value in (("epochs", 1),)}
    model = {
        "model.arch": "mobilenet_v3_small",
        "model.image_size": 32,
        "model.hidden": 8,
        "model.weights": "weights.pth",
    }
    return {"data.path": "my pictures", "workers": 0, **model, **phases, **more}


def test_what_runs_again_when_what_changes(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    after_split, after_build = list(STAGES[1:]), list(STAGES[2:])
    weights = (tmp_path / "weights.pth").read_bytes()

    assert repository.run_experiment(**settings()) == ["split", "data/dvc.yaml:weights", *after_split]
    assert not [
        line
        for line in repository.git("status", "--short").splitlines()
        if not line[3:].startswith(("metrics/", "params.yaml", "dvc.lock", "data/dvc.lock"))
    ]
    repository.commit()
    assert repository.ran("dvc", "repro") == []
    assert "up to date" in repository.call("dvc", "repro")

    assert repository.run_experiment(**{"device": "cpu", "workers": 1}) == []
    assert repository.run_experiment(**{"finetune.lr": 2e-05}) == ["finetune", "evaluate", "plot"]
    assert "lr: 2e-05" in (tmp_path / "params.yaml").read_text()
    assert repository.run_experiment(**{"finetune.epochs": 2}) == ["finetune", "evaluate", "plot"]
    assert repository.run_experiment(**{"train_head.lr": 0.002}) == after_build
    assert repository.run_experiment(**{"evaluate.batch_size": 7}) == ["evaluate"]
    assert repository.run_experiment(**{"split.test_size": 0.3}) == ["split", *after_split]
    # What was computed before is brought back, not computed again.
    assert repository.run_experiment(**{"split.test_size": 0.2}) == ["evaluate"]

    torch.save(mobilenet_v3_small().state_dict(), tmp_path / "weights.pth")
    assert repository.ran("dvc", "repro") == ["data/dvc.yaml:weights", "build_model", *after_build]
    assert repository.run_experiment(**{"model.weights": "null"}) == [
        "data/dvc.yaml:weights",
        "build_model",
        *after_build,
    ]
    assert repository.run_experiment(**{"model.weights": "weights.pth"})[0] == "data/dvc.yaml:weights"
    (tmp_path / "weights.pth").write_bytes(weights)
    assert repository.ran("dvc", "repro")[0] == "data/dvc.yaml:weights"
    assert (tmp_path / "weights.pth").read_bytes() == weights
    assert (tmp_path / "data" / "weights").is_symlink()

    Image.new("RGB", (40, 40), "red").save(tmp_path / "my pictures" / "cat" / "new.png")
    assert repository.ran("dvc", "repro")[:2] == ["split", "build_model"]
    script = tmp_path / "stages" / "common" / "scoring.py"
    script.write_text(f"{script.read_text()}\n")
    assert repository.ran("dvc", "repro") == ["evaluate"]
    assert repository.ran("dvc", "repro") == []

    assert "metrics/evaluation.json" in repository.call("dvc", "metrics", "diff")
    assert "data.path" not in repository.call("dvc", "params", "diff")
    assert "evaluate.batch_size" in repository.call("dvc", "params", "diff")
    page = repository.call("dvc", "plots", "diff", "--out", "page")
    assert "index.html" in page
    assert "failed to load" not in page
    html = (tmp_path / "page" / "index.html").read_text()
    for name in ("train_loss", "val_loss", "accuracy", "metrics/figures/loss.png", "HEAD", "workspace"):
        assert name in html


def test_an_experiment_in_the_queue_runs_in_a_copy_of_the_repository(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    changes = settings(**{"data.path": tmp_path / "my pictures", "model.weights": tmp_path / "weights.pth"})
    repository.call("dvc", "exp", "run", "--temp", *(f"--set-param={key}={value}" for key, value in changes.items()))
    assert "fine" in repository.call("dvc", "exp", "show", "--csv")
    assert not (tmp_path / "data" / "checkpoints").exists()


def test_a_refused_experiment_ends_with_the_stages_own_line_and_keeps_what_was_finished(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    repository.run_experiment(**settings())
    repository.commit()
    before = {path: path.read_bytes() for path in (tmp_path / "metrics").rglob("*") if path.is_file()}
    for change, message in (
        ("finetune.unfreeze=99", "error: finetune.unfreeze: should be from 0 to 13"),
        ("model.weights=missing.pth", "error: model.weights: missing.pth: no such file"),
        ("model.weights=DEFALT", "did you mean DEFAULT"),
    ):
        output = repository.call("dvc", "exp", "run", "--set-param", change, expect=255)
        assert message in output
        assert "Traceback" not in output
        repository.git("checkout", "--quiet", ".")
        assert set(repository.ran("dvc", "repro")) <= {"data/dvc.yaml:weights", "evaluate"}
    assert {path: path.read_bytes() for path in (tmp_path / "metrics").rglob("*") if path.is_file()} == before
