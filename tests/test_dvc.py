"""`dvc.yaml` against what each stage reads and imports, and what runs again, through DVC itself."""

import ast
import json
import os
import shutil
import subprocess
import sys
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, STAGES, Project, call_dvc, make_images, own_git
from PIL import Image

from stages.common import params as parameters
from stages.common.params import Section, load_section
from stages.network.backbones import stock_model
from stages.network.network import build_network, calibrate_batchnorm

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
DATA_PIPELINE = yaml.safe_load((ROOT / "data" / "dvc.yaml").read_text())
DATA_SCRIPTS = {
    "digits": "data/digits/make.py",
    "glyphs": "data/glyphs/pretrain.py",
    "weights": "data/link.py",
    "labels": "data/link.py",
    "corrections": "data/link.py",
}
# They say where to compute, not what.
UNTRACKED = {"device", "workers", "processes", "cache.max_gigabytes"}
# What a stage reads for a later one, to refuse it early, or to compute in passing what that one needs: nothing that it
# writes may depend on these.
READ_AHEAD = {"build_model": {"finetune.unfreeze"}, "train_head": {"finetune.unfreeze", "finetune.augment"}}
ROOMS = ("common", "images", "network", "training", "scores", "report", "deploy")
# What a room may import from, beside itself.
BELOW = {"scores": {"common", "images"}} | {
    room: set(ROOMS[:number]) for number, room in enumerate(ROOMS) if room != "scores"
}


@cache
def imports(path: Path) -> set[Path]:
    """The project's own modules that a module imports, directly or not."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(("stages", "data")):
            continue
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
            module = ROOT / f"{str(name).replace('.', '/')}.py"
            if module.is_file():
                found |= {module} | imports(module)
    return found


def covered(key: str, declared: set[str], separator: str) -> bool:
    return any(key == name or key.startswith(f"{name}{separator}") for name in declared)


def check_code(script: Path, declared: set[str]) -> None:
    """A script depends on itself and on what it imports, and on nothing else."""
    needed = {path.relative_to(ROOT).as_posix() for path in {script} | imports(script)}
    assert not {path for path in needed if not covered(path, declared, "/")}
    assert not {name for name in declared if not any(covered(path, {name}, "/") for path in needed)}


class Watch:
    """Which parameters are read, while it is open."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.read: set[str] = set()
        self.known: dict[int, str] = {}  # sections by identity: their dotted key
        self.get = Section.__getattribute__
        self.loaded: list[Section] = []  # kept, so that no other object gets their identities

        def load(path: Path, kind: type[Section]) -> Section:
            params = load_section(path, kind)
            self.loaded.append(params)
            self.know("", params)
            return params

        def get(section: Section, name: str) -> Any:
            value = self.get(section, name)
            if id(section) in self.known:
                prefix = self.known[id(section)]
                if name in type(section).model_fields and not isinstance(value, Section):
                    self.read.add(f"{prefix}{name}")
                elif name in {"model_dump", "model_dump_json", "model_copy", "__dict__"}:
                    self.read |= self.leaves(prefix, section)
            return value

        patch.setattr(parameters, "load_section", load)
        patch.setattr(Section, "__getattribute__", get)

    def know(self, prefix: str, section: Section) -> None:
        self.known[id(section)] = prefix
        for name in type(section).model_fields:
            if isinstance(value := self.get(section, name), Section):
                self.know(f"{prefix}{name}.", value)

    def leaves(self, prefix: str, section: Section) -> set[str]:
        found: set[str] = set()
        for name in type(section).model_fields:
            value = self.get(section, name)
            found |= self.leaves(f"{prefix}{name}.", value) if isinstance(value, Section) else {f"{prefix}{name}"}
        return found


def test_there_are_exactly_the_six_stages() -> None:
    assert tuple(PIPELINE["stages"]) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_its_script_and_on_the_rooms_that_it_imports_from(stage: str) -> None:
    declared = {dep for dep in PIPELINE["stages"][stage]["deps"] if dep.startswith("stages/")}
    assert declared <= {f"stages/{stage}.py", *(f"stages/{room}" for room in ROOMS)}
    check_code(ROOT / "stages" / f"{stage}.py", declared)


def test_the_stages_under_data_depend_on_what_they_import_from() -> None:
    assert set(DATA_SCRIPTS) == set(DATA_PIPELINE["stages"])
    for stage, script in DATA_SCRIPTS.items():
        check_code(ROOT / script, set(DATA_PIPELINE["stages"][stage]["deps"]))


def test_a_stage_reads_exactly_the_parameters_that_it_declares(project: Project) -> None:
    for stage in STAGES:
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch)
            assert project.run(stage) == 0
        declared = set(PIPELINE["stages"][stage]["params"])
        assert {key for key in watch.read - UNTRACKED if not covered(key, declared, ".")} == READ_AHEAD.get(
            stage, set()
        )
        assert not {name for name in declared if not any(covered(key, {name}, ".") for key in watch.read)}, stage


@pytest.mark.parametrize("stage", STAGES)
def test_every_path_of_a_command_is_declared(stage: str) -> None:
    entry = PIPELINE["stages"][stage]
    declared = [*entry["deps"], *entry.get("params", [])]
    for kind in ("outs", "metrics", "plots"):
        declared += [item if isinstance(item, str) else next(iter(item)) for item in entry.get(kind, [])]
    for word in entry["cmd"].split():
        if "/" in word:
            assert any(name == word or name.startswith((f"{word}/", f"{word}.")) for name in declared), word


def test_imports_run_one_way() -> None:
    for path in (ROOT / "stages").rglob("*.py"):
        own = path.relative_to(ROOT / "stages").parts[0]
        rooms = {module.relative_to(ROOT / "stages").parts[0] for module in imports(path)}
        assert rooms - {own} <= BELOW.get(own, set(ROOMS)), path


def write_weights(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    stock = stock_model("mobilenet_v3_small")
    network = build_network(stock, "pooled", 8, outputs=1, image_size=32)
    calibrate_batchnorm(network, [torch.randn(64, 3, 32, 32)])
    torch.save(stock.state_dict(), path)


class Repository:
    """A copy of the project in a git repository of its own, with tiny images and a weight file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = own_git(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        del self.environment["PYTHONPATH"]  # the copy's own stages run
        for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
        # Not what stages make: `dvc repro` may have been run in this checkout.
        made = ("images", "index", "checkpoints", "weights", "labels", "corrections", "*.npz")
        for name in (".dvc", "data"):
            ignore = shutil.ignore_patterns("__pycache__", "cache", "tmp", *made)
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        for lock in folder.rglob("dvc.lock"):
            lock.unlink()
        make_images(folder / "my images", count=12)
        write_weights(folder / "weights.pth", seed=1)
        (folder / ".gitignore").open("a").write("/my images\n/weights.pth\n")
        self.git("init", "--quiet")
        self.commit()

    def git(self, *arguments: str) -> str:
        return self.call("git", *arguments)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "state")

    def call(self, *command: str, expect: int = 0) -> str:
        if command[0] == "dvc":
            code, output = call_dvc(self.folder, self.environment, *command[1:])
        else:
            process = subprocess.run(
                command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
            )
            code, output = process.returncode, process.stdout + process.stderr
        assert code == expect, output
        return output

    def ran(self, *command: str) -> list[str]:
        """Call, and return the stages that were run."""
        output = self.call(*command)
        return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]

    def run_experiment(self, *stages: str, **params: object) -> list[str]:
        changes = (f"--set-param={key}={value}" for key, value in params.items())
        return self.ran("dvc", "exp", "run", *changes, *stages)

    def run_changed(self, *stages: str, **params: object) -> list[str]:
        """As an experiment would, in a third of the time."""
        content = yaml.safe_load((self.folder / "params.yaml").read_text())
        for key, value in params.items():
            *sections, name = key.split(".")
            reduce(dict.__getitem__, sections, content)[name] = value
        (self.folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return self.ran("dvc", "repro", *stages)


def count_numbers(value: Any) -> int:
    return sum(map(count_numbers, value.values())) if isinstance(value, dict) else isinstance(value, int | float)


def settings(**more: object) -> dict[str, object]:
    phases = {f"{phase}.{key}": value for phase in ("train_head", "finetune") for key, value in (("epochs", 1),)}
    model = {
        "model.arch": "mobilenet_v3_small",
        "model.image_size": 32,
        "model.hidden": 8,
        "model.weights": "weights.pth",
    }
    # Found, a linear head would be the same whatever the rate.
    return {"data.path": "my images", "workers": 0, "train_head.search": False, **model, **phases, **more}


def test_a_missing_data_set_is_refused_before_dvc_looks_for_it(project: Project) -> None:
    project.set("data.path", "photos")
    command = DATA_PIPELINE["stages"]["labels"]["cmd"].split()[1:]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, *command], cwd=project.folder, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 1
    assert process.stderr.startswith("error: data.path: photos does not exist; give a folder")


@pytest.mark.parametrize("stage", ["weights", "labels"])
def test_a_folder_where_a_link_belongs_is_refused_and_kept(project: Project, stage: str) -> None:
    project.path(f"data/{stage}").mkdir(parents=True)
    project.path(f"data/{stage}/own.pth").write_text("")
    command = DATA_PIPELINE["stages"][stage]["cmd"].split()[1:]
    project.path("params.yaml").write_text(yaml.safe_dump(project.params))
    process = subprocess.run(
        [sys.executable, *command],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: data/{stage}: a folder, where the pipeline makes a link")
    assert project.path(f"data/{stage}/own.pth").exists()


# In place of a stage: writes what the stage declares, with a content that depends on all that the stage depends on.
STAND_IN = """#!{python}
import hashlib, os, pathlib, sys, yaml

module = sys.argv[2]
if not module.startswith("stages."):
    os.execv("{python}", ["{python}", *sys.argv[1:]])
stage = yaml.safe_load(open("dvc.yaml"))["stages"][module.removeprefix("stages.")]
params = yaml.safe_load(open("params.yaml"))
digest = hashlib.sha256()
for key in stage["params"]:
    value = params
    for part in key.split("."):
        value = value[part]
    digest.update(repr(value).encode())
for dep in map(pathlib.Path, (dep.replace("${{data.path}}", params["data"]["path"]) for dep in stage["deps"])):
    for file in sorted(path for path in (dep, *dep.rglob("*")) if path.is_file()):
        digest.update(file.read_bytes())
outs = [out for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])]
for out in (pathlib.Path(out if isinstance(out, str) else next(iter(out))) for out in outs):
    file = out if out.suffix else out / "file"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(digest.hexdigest())
"""


def test_what_runs_again_when_what_changes(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    shutil.copy(ROOT / "data" / "dvc.lock", tmp_path / "data" / "dvc.lock")
    (stand_in := tmp_path / ".git" / "bin" / "python").parent.mkdir()
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    repository.environment["PATH"] = f"{stand_in.parent}{os.pathsep}{repository.environment['PATH']}"

    assert repository.run_experiment(**settings()) == [
        "data/dvc.yaml:labels",
        "data/dvc.yaml:corrections",
        "split",
        "data/dvc.yaml:weights",
        *STAGES[1:],
    ]
    changed = [line[3:] for line in repository.git("status", "--short").splitlines()]
    assert all(
        path.startswith(("metrics/", "data/index/", "params.yaml", "dvc.lock", "data/dvc.lock")) for path in changed
    )
    repository.commit()
    repository.call("dvc", "checkout")  # of the sample, which was never made here, nothing is missed
    again = repository.call("dvc", "repro")
    assert "up to date" in again
    assert "Running stage" not in again

    untracked = {"device": "cpu", "workers": 1, "processes": 1, "cache.max_gigabytes": 1.5}
    assert repository.run_experiment(**untracked, **{"finetune.lr": 2e-05}) == ["finetune", "evaluate", "plot"]
    assert "lr: 2e-05" in (tmp_path / "params.yaml").read_text()
    assert repository.run_changed(**{"evaluate.batch_size": 7})[0] == "evaluate"
    assert repository.run_changed("finetune", **{"train_head.lr": 0.003}) == ["train_head", "finetune"]
    assert repository.run_changed("train_head", **{"split.test_size": 0.3}) == ["split", "build_model", "train_head"]
    # What was trained before is brought back, not trained again.
    assert repository.run_changed("finetune", **{"split.test_size": 0.2}) == ["split", "build_model"]

    write_weights(tmp_path / "weights.pth", seed=2)
    assert repository.ran("dvc", "repro", "build_model") == ["data/dvc.yaml:weights", "build_model"]
    Image.new("RGB", (40, 40), "red").save(tmp_path / "my images" / "cat" / "000.png")
    assert repository.ran("dvc", "repro", "build_model") == ["split", "build_model"]
    for room, name in (("network", "layer_table"), ("report", "page")):
        script = tmp_path / "stages" / room / f"{name}.py"
        script.write_text(f"{script.read_text()}\n")
    # Not split, which imports from neither.
    assert repository.ran("dvc", "repro", "build_model") == ["build_model"]


def test_results_can_be_compared_by_dvc(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    (tmp_path / "my images").rename(tmp_path / "images")
    (tmp_path / ".gitignore").open("a").write("/images\n")
    # Not by DVC, which would start a process for each stage: what it compares is in git.
    project = Project(tmp_path)
    assert project.run(*STAGES) == 0
    repository.commit()
    project.set("finetune.lr", 2e-5)
    assert project.run("finetune", "evaluate", "plot") == 0

    assert "metrics/evaluation.json" in repository.call("dvc", "metrics", "diff")
    shown = json.loads(repository.call("dvc", "metrics", "show", "--json"))
    assert sum(count_numbers(file["data"]) for file in shown[""]["data"].values()) <= 14
    changes = repository.call("dvc", "params", "diff")
    assert "finetune.lr" in changes
    assert "data.path" not in changes
    page = repository.call("dvc", "plots", "diff", "--out", "page")
    assert "index.html" in page
    assert "failed to load" not in page
    html = (tmp_path / "page" / "index.html").read_text()
    for name in ("train_loss", "val_loss", "accuracy", "metrics/figures/training.png", "HEAD", "workspace"):
        assert name in html
    for plot in (next(iter(plot)) for plot in PIPELINE["plots"]):
        assert plot in html


def test_the_weight_file_is_tracked_and_never_changed(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    weights, link = tmp_path / "weights.pth", tmp_path / "data" / "weights"
    first = weights.read_bytes()

    def run_with(value: str | None) -> list[str]:
        return repository.run_changed("data/dvc.yaml:weights", **settings(**{"model.weights": value}))

    assert run_with("weights.pth") == ["data/dvc.yaml:weights"]
    assert link.resolve() == weights
    assert run_with("DEFAULT") == ["data/dvc.yaml:weights"]
    assert link.is_file()
    assert not link.is_symlink()
    assert run_with("weights.pth") == ["data/dvc.yaml:weights"]
    assert link.resolve() == weights
    write_weights(weights, seed=2)
    second = weights.read_bytes()
    assert second != first
    assert run_with("weights.pth") == ["data/dvc.yaml:weights"]
    assert run_with(None) == ["data/dvc.yaml:weights"]
    assert weights.read_bytes() == second


@pytest.mark.slow
def test_the_table_of_labels_is_tracked(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    table, changes = tmp_path / "labels.csv", settings(**{"data.labels": "labels.csv"})
    paths = sorted(path.relative_to(tmp_path / "my images").as_posix() for path in tmp_path.glob("my images/*/*"))
    rows = [f"{path},{path.split('/')[0]}" for path in paths]
    table.write_text("\n".join(["path,label", *rows]))
    assert repository.run_experiment("split", **changes) == ["data/dvc.yaml:labels", "split"]
    assert (tmp_path / "data" / "labels").resolve() == table
    assert repository.run_experiment("split", **changes) == []
    table.write_text("\n".join(["path,label", rows[0].replace(",cat", ",dog"), *rows[1:]]))
    assert repository.run_experiment("split", **changes) == ["data/dvc.yaml:labels", "split"]
    output = repository.call("dvc", "exp", "run", "--set-param=data.labels=nowhere.csv", "split", expect=255)
    assert "error: data.labels: nowhere.csv: no such file" in output


@pytest.mark.slow
def test_an_experiment_runs_in_a_copy_of_the_repository(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    changes = settings(**{"data.path": tmp_path / "my images", "model.weights": tmp_path / "weights.pth"})
    options = (f"--set-param={key}={value}" for key, value in changes.items())
    output = repository.call("dvc", "exp", "run", "--temp", *options, "build_model")
    assert f"weights {tmp_path / 'weights.pth'}, 32 px" in output
    assert not (tmp_path / "data" / "checkpoints").exists()


@pytest.mark.slow
def test_a_refused_experiment_shows_the_stages_own_line_and_loses_nothing(tmp_path: Path) -> None:
    repository = Repository(tmp_path)

    def refused(**changes: object) -> str:
        options = (f"--set-param={key}={value}" for key, value in settings(**changes).items())
        output = repository.call("dvc", "exp", "run", *options, "build_model", expect=255)
        assert "Traceback" not in output
        return output

    assert "error: finetune.unfreeze: should be from 0 to 13" in refused(**{"finetune.unfreeze": 99})
    good = {"finetune.unfreeze": 3}
    assert repository.run_experiment("build_model", **settings(**good)) == ["build_model"]
    metrics = {path: path.read_bytes() for path in (tmp_path / "metrics").rglob("*") if path.is_file()}
    assert "error: model.weights: missing.pth: no such file" in refused(**{"model.weights": "missing.pth"})
    assert "did you mean DEFAULT" in refused(**{"model.weights": "DEFALT"})
    assert repository.run_experiment("build_model", **settings(**good)) == ["data/dvc.yaml:weights"]
    assert {path: path.read_bytes() for path in (tmp_path / "metrics").rglob("*") if path.is_file()} == metrics
