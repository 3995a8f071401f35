"""A run that is stopped, however, goes on where it was and ends with the same bytes."""

import importlib
import os
import signal
from functools import reduce
from itertools import count
from pathlib import Path
from resource import RLIMIT_FSIZE, setrlimit
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Project, run_forked

from stages.training import cache, resume
from stages.training.history import Epoch, History, read_history, read_kept
from stages.training.resume import StateFile

PLACES = {
    # Four training batches and one of validation make an epoch, and one is before all: the second step of the third.
    "inside an epoch": ("stages.network.objective", "loss", 2 * 4 + 2, 2),
    # The fourth line of the history: the third epoch is finished, but its state is not yet written.
    "between two epochs": ("stages.training.history", "History.add", 4, 2),
}


def run_killed(project: Project, stage: str, module: str, attribute: str, last: int) -> None:
    """Run a stage that writes its state after each epoch, and kills itself at one of the calls of a function."""

    def work() -> int:
        resume.SECONDS = 0.0
        *owners, name = attribute.split(".")
        owner = reduce(getattr, owners, importlib.import_module(module))
        real, calls = getattr(owner, name), count(1)

        def count_and_call(*arguments: Any) -> Any:
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(owner, name, count_and_call)
        return project.run(stage)

    printed = project.path("printed")
    assert run_forked(printed, work) == -signal.SIGKILL, printed.read_text()


def outputs(project: Project, stage: str) -> dict[str, bytes]:
    name = {"train_head": "head", "finetune": "finetuned"}[stage]
    files = [project.checkpoint(name), *(project.path("metrics") / stage).rglob("*.*")]
    return {path.name: path.read_bytes() for path in files if path.is_file()}


def states() -> list[Path]:
    return list((cache.cache_folder() / "states").glob("*"))


@pytest.fixture
def built(project: Project) -> Project:
    # All that draws random numbers while training: dropout in the head, and augmentation.
    project.set("model.head", "original")
    for phase in ("train_head", "finetune"):
        project.set(f"{phase}.epochs", 4)
        project.set(f"{phase}.augment", "light")
    project.set("finetune.lr", 1e-3)
    project.build()
    return project


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ("train_head", "inside an epoch"),
        ("finetune", "between two epochs"),
        pytest.param("train_head", "between two epochs", marks=pytest.mark.slow),
        pytest.param("finetune", "inside an epoch", marks=pytest.mark.slow),
    ],
)
def test_a_killed_stage_resumes_and_ends_with_the_same_bytes(
    built: Project, capsys: pytest.CaptureFixture[str], stage: str, place: str
) -> None:
    if stage == "finetune":
        assert built.run("train_head") == 0
    assert built.run(stage) == 0
    whole = outputs(built, stage)
    built.checkpoint("head" if stage == "train_head" else "finetuned").unlink()
    assert states() == []

    module, attribute, call, finished = PLACES[place]
    run_killed(built, stage, module, attribute, call)
    assert len(states()) == 1
    capsys.readouterr()
    assert built.run(stage) == 0
    assert f"resuming after epoch {finished}" in capsys.readouterr().out
    assert outputs(built, stage) == whole
    assert states() == []


@pytest.mark.parametrize("stage", [pytest.param("train_head", marks=pytest.mark.slow), "finetune"])
@pytest.mark.parametrize(
    "optimizer", [pytest.param("adam"), *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "sgd"))]
)
def test_a_killed_stage_resumes_with_any_optimizer_and_every_key(
    built: Project, capsys: pytest.CaptureFixture[str], stage: str, optimizer: str
) -> None:
    built.use_every_training_key(optimizer)
    assert built.run(*(["train_head"] if stage == "finetune" else []), stage) == 0
    whole = outputs(built, stage)
    run_killed(built, stage, *PLACES["inside an epoch"][:3])
    capsys.readouterr()
    assert built.run(stage) == 0
    assert "resuming after epoch 2" in capsys.readouterr().out
    assert outputs(built, stage) == whole


def test_the_state_is_written_every_half_minute(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 0.0, []
    monkeypatch.setattr("stages.training.resume.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(StateFile, "_write", lambda _, values: written.append(len(values["epochs"]) - 1))
    real = History.add

    def add(history: History, epoch: Epoch) -> None:
        nonlocal now
        now += 16
        real(history, epoch)

    monkeypatch.setattr(History, "add", add)
    built.set("train_head.epochs", 6)
    assert built.run("train_head") == 0
    # Epoch 0 is the first to be added; after the last epoch there is nothing to go on with.
    assert written == [1, 3, 5]


def test_a_state_without_room_on_the_disk_is_reported_and_training_continues(built: Project) -> None:
    def work() -> int:
        resume.SECONDS = 0.0
        setrlimit(RLIMIT_FSIZE, (9000, -1))
        return built.run("train_head")

    run_forked(printed := built.path("printed"), work)
    assert "a run that is stopped will start again, its state is not kept: " in printed.read_text()
    assert "Traceback" not in printed.read_text()


@pytest.mark.parametrize("content", [b"", b"\0", b"PK\3\4"])
def test_an_empty_state_is_ignored(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    state = StateFile(torch.device("cpu"), 1.0, [content.hex()])
    state.path.parent.mkdir(parents=True, exist_ok=True)
    state.path.write_bytes(content)
    assert state.load() is None
    assert capsys.readouterr().out.startswith(f"{state.path}: damaged (")
    state.remove()


@pytest.mark.parametrize("select", ["line", *(pytest.param(name, marks=pytest.mark.slow) for name in ("best", "last"))])
def test_a_killed_fine_tuning_keeps_the_same_point(built: Project, select: str) -> None:
    built.set("finetune.lr", 0.05)
    built.set("finetune.select", select)
    assert built.run("train_head", "finetune") == 0
    whole = outputs(built, "finetune")
    epochs = read_history(built.path("metrics/finetune"))
    if select == "best":
        lowest = min(epochs, key=lambda epoch: epoch.val_loss)
        assert read_kept(built.path("metrics/finetune"), epochs)[0] == lowest.number
    run_killed(built, "finetune", *PLACES["inside an epoch"][:3])
    assert built.run("finetune") == 0
    assert outputs(built, "finetune") == whole


def test_a_killed_run_is_not_resumed_with_other_parameters(built: Project, capsys: pytest.CaptureFixture[str]) -> None:
    run_killed(built, "train_head", *PLACES["inside an epoch"][:3])
    kept = states()
    built.set("train_head.lr", 2e-3)
    assert built.run("train_head") == 0
    assert "resuming" not in capsys.readouterr().out
    assert states() == kept
    kept[0].unlink()


def test_a_damaged_state_is_ignored_with_one_line(built: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert built.run("train_head") == 0
    whole = outputs(built, "train_head")
    run_killed(built, "train_head", *PLACES["inside an epoch"][:3])
    (state,) = states()
    state.write_bytes(state.read_bytes()[:2000])
    capsys.readouterr()
    assert built.run("train_head") == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith(f"{state}: damaged (")]
    assert "resuming" not in printed
    assert outputs(built, "train_head") == whole


def test_a_state_that_cannot_be_written_is_reported_once_and_training_continues(
    built: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: StateFile, values: dict[str, object]) -> None:
        raise OSError(28, "No space left on device", "states")

    monkeypatch.setattr(resume, "SECONDS", 0.0)
    monkeypatch.setattr(StateFile, "_write", refuse)
    assert built.run("train_head") == 0
    line = "a run that is stopped will start again, its state is not kept: states: No space"
    assert capsys.readouterr().out.count(line) == 1
