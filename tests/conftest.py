import hashlib
import importlib
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from _pytest.mark import ParameterSet
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common.cli import run
from stages.images.index import PARTS, Entry, read_index
from stages.training import cache

# The networks here are so small that handing work to threads costs more than the work.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# What the first two stages wrote, for the tests that are about later ones.
BUILT = tempfile.TemporaryDirectory(prefix="dvc-finetune-built-")
ROOT = Path(__file__).parent.parent
STAGES = ("split", "build_model", "train_head", "finetune", "evaluate", "plot")

# torchvision's classes of networks, each with its smallest.
FAMILIES = {
    "AlexNet": "alexnet",
    "ConvNeXt": "convnext_tiny",
    "DenseNet": "densenet121",
    "EfficientNet": "efficientnet_b0",
    "GoogLeNet": "googlenet",
    "Inception3": "inception_v3",
    "MNASNet": "mnasnet0_5",
    "MaxVit": "maxvit_t",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3": "mobilenet_v3_small",
    "RegNet": "regnet_y_400mf",
    "ResNet": "resnet18",
    "ShuffleNetV2": "shufflenet_v2_x0_5",
    "SqueezeNet": "squeezenet1_1",
    "SwinTransformer": "swin_t",
    "VGG": "vgg11_bn",
    "VisionTransformer": "vit_b_32",
}
# Seconds each: left out where `-m slow` is not given.
LARGE = ("convnext_tiny", "densenet121", "inception_v3", "maxvit_t", "swin_t", "vgg11_bn", "vit_b_32")


def families() -> list[ParameterSet]:
    """One network of each family, the large ones marked as slow."""
    return [pytest.param(arch, marks=pytest.mark.slow if arch in LARGE else ()) for arch in FAMILIES.values()]


def image_size_of(arch: str) -> int:
    """A small size that a network takes, pixels."""
    if arch.startswith("maxvit"):
        return 224
    if arch == "vit_h_14":
        return 70
    return 96 if arch == "inception_v3" else 64


def randomize_batchnorm(model: nn.Module, least_variance: float = 0.5) -> None:
    """Give BatchNorm statistics and affine parameters as trained ones have: neither 0 nor 1."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, least_variance, 1.5)


def make_images(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 20, size: int = 40) -> Path:
    """Noise in another colour for each class: quick to make, easy to tell apart."""
    noise = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = noise.integers(0, 60, (size, size, 3), dtype=np.uint8)
            pixels[..., label % 3] += 180
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


@lru_cache
def pipeline() -> dict[str, Any]:
    """The content of `dvc.yaml`; reading it takes longer than some stages."""
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())


class Project:
    """A folder in which the stages run as `dvc.yaml` says, on small images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.params: dict[str, Any] = yaml.load((ROOT / "params.yaml").read_text(), yaml.CSafeLoader)
        self.params["data"]["path"] = "images"
        model = {"arch": "mobilenet_v3_small", "weights": None, "image_size": 32, "hidden": 8, "head": "flatten"}
        self.params["model"] |= model
        self.params |= {"workers": 0, "device": "cpu"}
        plain = {"schedule": "constant", "warmup": 0.0, "optimizer": "adam", "weight_decay": 0.0, "patience": None}
        self.params["train_head"] |= {"epochs": 2, "batch_size": 8, "lr": 1e-3, **plain}
        self.params["finetune"] |= {"epochs": 2, "batch_size": 8, "lr": 1e-5, "unfreeze": 3, **plain}
        self.write_params()

    def set(self, key: str, value: object) -> None:
        *sections, name = key.split(".")
        section = self.params
        for part in sections:
            section = section[part]
        section[name] = value
        self.write_params()

    def write_params(self) -> None:
        # Three times as fast as `safe_dump`.
        (self.folder / "params.yaml").write_text(yaml.dump(self.params, Dumper=yaml.CSafeDumper))

    def use_every_training_key(self, optimizer: str) -> None:
        """Train with every key that is off by default."""
        self.set("class_weights", {"cat": 3.0, "dog": 1.0})
        for phase in ("train_head", "finetune"):
            self.set(f"{phase}.optimizer", optimizer)
            self.set(f"{phase}.lr", 1e-2 if optimizer == "sgd" else 1e-3)
            self.set(f"{phase}.weight_decay", 0.1)
            self.set(f"{phase}.schedule", "cosine")
            self.set(f"{phase}.warmup", 0.3)
            self.set(f"{phase}.clip_norm", 1.0)
            self.set(f"{phase}.label_smoothing", 0.1)
        self.set("finetune.layer_decay", 0.7)

    def path(self, name: str) -> Path:
        return self.folder / name

    def checkpoint(self, name: str) -> Path:
        return self.folder / "data" / "checkpoints" / f"{name}.safetensors"

    def arguments(self, stage: str) -> list[str]:
        python, dash_m, module, *rest = shlex.split(pipeline()["stages"][stage]["cmd"])
        assert (python, dash_m, module) == ("python", "-m", f"stages.{stage}")
        return rest

    def build(self) -> None:
        """Run the first two stages; what they once wrote for the same parameters and images is taken again."""
        later = ("workers", "processes", "cache", "train_head", "finetune", "evaluate")
        about = hashlib.sha256(json.dumps({**self.params, **dict.fromkeys(later)}, sort_keys=True).encode())
        for image in sorted(self.path("images").rglob("*.*")):
            about.update(f"{image.relative_to(self.folder)}".encode() + image.read_bytes())
        kept = Path(BUILT.name) / about.hexdigest()
        if not kept.exists():
            assert self.run("split", "build_model") == 0
            for folder in ("data", "metrics"):
                shutil.copytree(self.path(folder), kept / folder)
        for folder in ("data", "metrics"):
            shutil.copytree(kept / folder, self.path(folder), dirs_exist_ok=True)

    def run(self, *stages: str) -> int:
        """Run stages in this process; the exit code of the first that fails, else 0."""
        for stage in stages:
            module = importlib.import_module(f"stages.{stage}")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.folder)
                patch.setattr(sys, "argv", [f"stages.{stage}", *self.arguments(stage)])
                with pytest.raises(SystemExit) as exit_info:
                    run(module.main)
            if exit_info.value.code:
                return int(exit_info.value.code)
        return 0

    def parts(self) -> dict[str, list[Entry]]:
        """The index files, by part."""
        return {part: read_index(self.path(f"data/index/{part}.csv")) for part in PARTS}

    def split_report(self) -> dict[str, Any]:
        return json.loads(self.path("metrics/split.json").read_text())

    def start(self, stage: str, **options: Any) -> subprocess.Popen[str]:
        """Start a stage as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", f"stages.{stage}", *self.arguments(stage)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            **{"cwd": self.folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
        )


def run_forked(output: Path, *works: Callable[[], int | None]) -> int:
    """Run each in a process of its own, at once, without the seconds that imports take.

    Returned is the first exit code that is not 0, negative for a signal. What they print goes to a file.
    """

    def child(work: Callable[[], int | None]) -> None:
        with output.open("a") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (to the end of the process)
        code = 1
        try:
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(work,)) for work in works]
    output.write_text("")
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    assert None not in codes, output.read_text()
    return next(filter(None, codes), 0)


def own_git(**more: str) -> dict[str, str]:
    """Environment variables with which git commits, whoever's machine it is."""
    names = {f"GIT_{who}_{what}": "test@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return {**os.environ, **names, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1", **more}


def call_dvc(folder: Path, environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Call DVC as its command does, in a folder; its exit code, and what it and the stages print."""
    import dvc.cli
    import dvc.logger
    import dvc.repo.experiments

    def work() -> int:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        dvc.logger.setup()
        return int(dvc.cli.main(list(arguments)) or 0)

    with tempfile.NamedTemporaryFile() as output:
        code = run_forked(Path(output.name), work)
        return code, Path(output.name).read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: of several processes, none then waits for them at the end."""
    longest = ("dvc", "processes", "pipeline", "resume", "refusals", "features", "families", "predict")
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in longest)


def call_script(module: Any, *arguments: object) -> int:
    """Run a script that one calls by hand, in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            run(module.main)
    return int(exit_info.value.code or 0)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the user's cache out of the tests, and the tests out of it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv(cache.VARIABLE, str(folder))
        yield folder


@pytest.fixture
def cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for one test alone; returns its folder, which is not there yet."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    make_images(tmp_path / "images")
    return Project(tmp_path)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[[Project, str], str]:
    """Run a stage that has to refuse: exit code 1, one line on stderr, which is returned."""

    def refused(project: Project, stage: str) -> str:
        capsys.readouterr()
        assert project.run(stage) == 1
        line = capsys.readouterr().err
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        return line

    return refused
