"""The bundled backbone: the task it learned, how it is trained, and what its file says."""

import hashlib
import json
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from test_dvc import Repository

from data.glyphs import pretrain
from data.glyphs.drawing import CELL, CHARACTERS, FACES, Glyphs, draw, load_glyphs
from stages.common.cli import INTERRUPTED, run
from stages.network.weights import METADATA_KEY, find_weights

BACKBONE = ROOT / "data" / "glyphs" / "backbone.safetensors"
TINY = {"seed": 1, "steps": 4, "test_pictures": 12, "batch_size": 8, "image_size": 32, "lr": 0.001}
TINY |= {"weight_decay": 0.05}


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return load_glyphs()


def test_no_character_is_listed_twice_and_none_is_a_digit() -> None:
    assert len(set(CHARACTERS)) == len(CHARACTERS)
    assert not any(unicodedata.category(character) == "Nd" for character in CHARACTERS)
    assert not set(CHARACTERS) & set("OoQDIl|ZzSsBGbgq")


def test_every_character_has_many_faces_and_lies_inside_its_cell(glyphs: Glyphs) -> None:
    assert glyphs.ink.shape == (len(glyphs.labels), 1, CELL, CELL)
    assert glyphs.labels.bincount(minlength=len(CHARACTERS)).min() >= 8
    edge = torch.cat([glyphs.ink[..., 0, :], glyphs.ink[..., -1, :], glyphs.ink[..., 0], glyphs.ink[..., -1]], dim=-1)
    assert int(edge.max()) == 0
    assert glyphs.ink.flatten(1).max(dim=1).values.min() > 100


def test_no_two_characters_of_a_face_are_the_same_picture(glyphs: Glyphs) -> None:
    # A font without a character draws the same box for all of them.
    first = glyphs.ink[: len(CHARACTERS)]
    assert glyphs.labels[: len(CHARACTERS)].tolist() == list(range(len(CHARACTERS))), FACES[0]
    assert len({picture.numpy().tobytes() for picture in first}) == len(CHARACTERS)


def test_the_same_seed_draws_the_same_pictures(glyphs: Glyphs) -> None:
    labels = torch.arange(len(CHARACTERS))
    first, again, other = (draw(glyphs, labels, 48, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (len(CHARACTERS), 3, 48, 48)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1


def test_the_drawn_character_is_the_one_asked_for(glyphs: Glyphs) -> None:
    # Two characters that differ in where their ink is, whatever is done to them: a full one and a thin one.
    labels = torch.tensor([CHARACTERS.index("♥"), CHARACTERS.index("L")]).repeat_interleave(200)
    pictures = draw(glyphs, labels, 64, torch.Generator().manual_seed(0)).mean(dim=1)
    paper = pictures[:, :3].mean(dim=(1, 2), keepdim=True)
    ink = ((pictures - paper).abs() > 0.25).float().mean(dim=(1, 2))
    assert ink[:200].median() > 1.5 * ink[200:].median()


def pretrain_in(folder: Path, **changes: object) -> int:
    (folder / "params.yaml").write_text(yaml.safe_dump({**TINY, **changes}))
    arguments = [
        "--params",
        "params.yaml",
        "--device",
        "cpu",
        "--state",
        "state.pt",
        "--output",
        "backbone.safetensors",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["data.glyphs.pretrain", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            run(pretrain.main)
    return int(exit_info.value.code or 0)


def about(path: Path) -> dict[str, object]:
    with safe_open(path, framework="pt") as file:
        assert set(file.metadata()) == {METADATA_KEY}
        content: dict[str, object] = json.loads(file.metadata()[METADATA_KEY])
        return content


def test_pretraining_writes_a_backbone_that_can_be_used_as_weights(tmp_path: Path) -> None:
    assert pretrain_in(tmp_path) == 0
    assert not (tmp_path / "state.pt").exists()
    said = about(tmp_path / "backbone.safetensors")
    assert (said["pictures"], said["image_size"], said["seed"]) == (32, 32, 1)
    weights = find_weights("mobilenet_v3_large", str(tmp_path / "backbone.safetensors"))
    assert weights.preprocessing.crop == 32
    assert all(key.startswith("features.") for key in weights.tensors)
    assert {tensor.dtype for tensor in weights.tensors.values()} == {torch.float16, torch.int64}


def test_a_resumed_pretraining_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    assert pretrain_in(whole) == 0
    monkeypatch.setattr(pretrain, "SECONDS_BETWEEN_STATES", 0)
    before_each_step = iter([None, None, KeyboardInterrupt])

    def interrupt() -> None:
        if error := next(before_each_step, None):
            raise error

    monkeypatch.setattr(pretrain, "stop_if_interrupted", interrupt)
    assert pretrain_in(stopped) == INTERRUPTED
    assert not (stopped / "backbone.safetensors").exists()
    capsys.readouterr()
    assert pretrain_in(stopped) == 0
    assert "going on after batch 2 of 4" in capsys.readouterr().out
    assert (stopped / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()


@pytest.mark.parametrize(("problem", "message"), [("other", "other parameters"), ("damaged", "damaged")])
def test_a_state_that_does_not_fit_is_ignored_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], problem: str, message: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "SECONDS_BETWEEN_STATES", 0)
        patch.setattr(pretrain.Pretrainer, "evaluate", lambda _: sys.exit(3))
        assert pretrain_in(tmp_path) == 3
    state = tmp_path / "state.pt"
    if problem == "damaged":
        state.write_bytes(state.read_bytes()[:1000])
    capsys.readouterr()
    assert pretrain_in(tmp_path, seed=1 if problem == "damaged" else 2) == 0
    assert f"state.pt: {message}" in capsys.readouterr().out.replace("of a run with ", "")


def test_a_bad_parameter_of_pretraining_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_in(tmp_path, steps=0) == 1
    assert capsys.readouterr().err == "error: params.yaml: steps: should be greater than or equal to 1, is 0\n"


def test_the_bundled_file_matches_its_parameters_and_the_lock() -> None:
    said, params = about(BACKBONE), yaml.safe_load((ROOT / "data" / "glyphs" / "params.yaml").read_text())
    assert said["pictures"] == params["steps"] * params["batch_size"]
    assert (said["image_size"], said["seed"]) == (params["image_size"], params["seed"])
    assert said["characters"] == CHARACTERS
    lock = yaml.safe_load((ROOT / "data" / "dvc.lock").read_text())["stages"]["glyphs"]
    assert lock["outs"][0]["md5"] == hashlib.md5(BACKBONE.read_bytes()).hexdigest()
    assert BACKBONE.stat().st_size < 7e6
    assert all(key.startswith("features.") for key in load_file(BACKBONE))
    assert yaml.safe_load((ROOT / "params.yaml").read_text())["model"]["image_size"] == said["image_size"]


@pytest.mark.slow
def test_pretraining_runs_only_when_asked_for(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    backbone = tmp_path / "data" / "glyphs" / "backbone.safetensors"
    before = backbone.read_bytes()
    changes = {f"data/glyphs/params.yaml:{key}": value for key, value in TINY.items()}
    assert repository.ran("dvc", "repro", "data/dvc.yaml:glyphs") == []
    assert repository.run_experiment("data/dvc.yaml:glyphs", **changes) == []
    assert backbone.read_bytes() == before
    repository.call("dvc", "unfreeze", "data/dvc.yaml:glyphs")
    assert repository.ran("dvc", "repro", "data/dvc.yaml:glyphs") == ["data/dvc.yaml:glyphs"]
    assert about(backbone)["pictures"] == 32
    assert repository.ran("dvc", "repro", "data/dvc.yaml:glyphs") == []
