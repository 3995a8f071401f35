"""`python -m stages.backbones`: which network to fine-tune."""

import csv
import re
import shlex

import pytest
from conftest import Project, call_script

from stages import backbones
from stages.training.features import FrozenPrefix

NETWORKS = ("mobilenet_v3_small=null", "resnet18=absent.pth", "squeezenet1_1=null", "resnet81")


def call(project: Project, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.chdir(project.folder)
    return call_script(backbones, *arguments)


def test_each_network_has_a_row_and_the_activations_of_the_best_are_kept(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.set("finetune.unfreeze", 99)
    project.set("model.head", "flatten")
    assert project.run("split") == 0
    assert call(project, monkeypatch, *NETWORKS) == 0
    said = capsys.readouterr().out
    with project.path("backbones.csv").open() as file:
        rows = {row["network"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["mobilenet_v3_small", "resnet18", "squeezenet1_1", "resnet81"]
    assert "absent.pth" in rows["resnet18"]["problem"]
    assert "did you mean resnet18" in rows["resnet81"]["problem"]
    assert re.search(r"resnet18: model.weights: absent.pth: No such file", said)
    for name in ("mobilenet_v3_small", "squeezenet1_1"):
        row = {key: float(rows[name][key]) for key in ("accuracy_low", "accuracy", "accuracy_high", "loss")}
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        assert float(rows[name]["images_per_second"]) > 0
    assert project.path("backbones.png").stat().st_size > 5_000

    (line,) = re.findall(r"^the best: dvc exp run (.*)$", said, re.MULTILINE)
    settings = dict(option.split("=") for option in shlex.split(line) if option != "-S")
    assert settings["model.head"] == "pooled"
    assert int(settings["finetune.unfreeze"]) < 99
    for key, value in settings.items():
        project.set(key, int(value) if value.isdigit() else {"true": True, "null": None}.get(value, value))
    assert project.run("build_model") == 0
    monkeypatch.setattr(FrozenPrefix, "forward", None)
    assert project.run("train_head", "finetune") == 0
    expected = f"{float(rows[settings['model.arch']]['loss']):.4f}"
    assert expected in said


def test_networks_that_cannot_be_tried_have_a_row_with_the_reason(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project.run("split") == 0
    assert call(project, monkeypatch, "resnet18=absent.pth") == 1
    captured = capsys.readouterr()
    assert "absent.pth" in captured.out
    assert captured.err.splitlines()[-1].startswith("error: no network could be tried")
