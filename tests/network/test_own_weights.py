"""A checkpoint of this project as the start of another training."""

import shutil
from collections.abc import Callable

import pytest
import torch
from conftest import Project
from safetensors.torch import load_file
from torch import nn

Refusal = Callable[[Project, str], str]


@pytest.fixture
def trained(project: Project) -> Project:
    """A project whose weights are its own checkpoint, made with the head phase's network."""
    project.build()
    assert project.run("train_head") == 0
    shutil.copy(project.checkpoint("head"), project.path("start.safetensors"))
    project.set("model.weights", "start.safetensors")
    return project


def test_an_own_checkpoint_with_the_same_classes_gives_backbone_and_head(
    trained: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained.run("build_model") == 0
    assert "weights start.safetensors with its head" in capsys.readouterr().out
    start, initial = load_file(trained.path("start.safetensors")), load_file(trained.checkpoint("initial"))
    assert start.keys() == initial.keys()
    assert all(torch.equal(start[key], initial[key]) for key in start)
    assert trained.run("train_head", "finetune") == 0


def test_a_found_head_is_taken_over_and_the_search_may_find_another(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.set("model.head", "pooled")
    project.set("train_head.search", True)
    assert project.run("split", "build_model", "train_head") == 0
    shutil.copy(project.checkpoint("head"), project.path("start.safetensors"))
    project.set("model.weights", "start.safetensors")
    assert project.run("build_model") == 0
    assert "weights start.safetensors with its head" in capsys.readouterr().out
    start, initial = load_file(project.path("start.safetensors")), load_file(project.checkpoint("initial"))
    assert start.keys() == initial.keys()
    assert all(torch.equal(start[key], initial[key]) for key in start)
    assert project.run("train_head") == 0
    project.set("train_head.search", False)
    assert project.run("train_head", "finetune") == 0


@pytest.mark.parametrize("change", ["classes", "head"])
def test_an_own_checkpoint_with_other_classes_or_head_gives_the_backbone(
    trained: Project, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    if change == "classes":
        trained.path("images/dog").rename(trained.path("images/wolf"))
    else:
        trained.set("model.head", "pooled")
    assert trained.run("split", "build_model") == 0
    assert "weights start.safetensors with a new head" in capsys.readouterr().out
    start, initial = load_file(trained.path("start.safetensors")), load_file(trained.checkpoint("initial"))
    backbone = [key for key in start if key.startswith("backbone.")]
    assert all(torch.equal(start[key], initial[key]) for key in backbone)
    assert not torch.equal(start["classifier.1.weight"], initial.get("classifier.1.weight", torch.zeros(1)))
    assert trained.run("train_head") == 0


def test_a_checkpoint_of_another_architecture_is_refused_with_its_name(trained: Project, refusal: Refusal) -> None:
    trained.set("model.arch", "resnet18")
    assert "start.safetensors is a mobilenet_v3_small; set model.arch=mobilenet_v3_small" in refusal(
        trained, "build_model"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_by_name(project: Project, refusal: Refusal) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(project.path("model.pth")))
    project.set("model.weights", "model.pth")
    assert project.run("split") == 0
    assert "model.weights: model.pth is TorchScript, whose code is not run" in refusal(project, "build_model")
