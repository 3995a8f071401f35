"""Back along the line from the end of fine-tuning: which point is kept, and that it is one on the line."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Project
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from stages import finetune
from stages.common.files import read_table
from stages.network.checkpoint import load_checkpoint
from stages.training import loop
from stages.training.history import read_history, read_kept
from stages.training.line import ALPHAS, Point, choose
from stages.training.phase import finish


def losses(best: float, depth: float, noise: float = 0.02, images: int = 200) -> list[np.ndarray]:
    """A parabola with its lowest point at `best`; images differ in how hard they are, and in how they change."""
    chance = np.random.default_rng(0)
    hard, change = chance.exponential(0.5, images), chance.normal(0, noise, images)
    return [hard + depth * (alpha - best) ** 2 + alpha * (change - change.mean()) for alpha in ALPHAS]


@pytest.mark.parametrize("best", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_a_clearly_lowest_point_is_kept(best: float) -> None:
    assert ALPHAS[choose(losses(best, depth=10.0))] == best


@pytest.mark.parametrize("best", [0.6, 1.0])
def test_of_equally_good_points_the_one_nearest_to_80_percent_is_kept(best: float) -> None:
    assert ALPHAS[choose(losses(best, depth=1e-4, noise=1e-3))] == 0.8


def test_the_kept_loss_is_never_above_that_of_the_start() -> None:
    chance = np.random.default_rng(1)
    for _ in range(200):
        every = [values + chance.normal(0, 0.1) for values in losses(chance.random(), chance.exponential(0.3), 0.3, 30)]
        assert every[choose(every)].mean() <= every[0].mean()


def test_images_of_a_group_are_one_observation() -> None:
    change = np.random.default_rng(0).normal(0, 0.1, 12)
    single = [1 + alpha * (change - change.mean() - 0.02) for alpha in ALPHAS]
    tenfold = [np.repeat(values, 10) for values in single]
    # Twelve images cannot tell 80% from the end, and ten copies of each can no more.
    assert choose(tenfold, np.repeat(np.arange(12), 10)) == choose(single) == 8
    assert choose(tenfold) == 10


@pytest.mark.parametrize(("slope", "kept"), [(0.2, 0), (-0.2, 10)])
def test_no_point_above_a_barrier_is_kept(slope: float, kept: int) -> None:
    # As at rates that are too high: the images cannot tell the end from the start, but the way there is much worse.
    random = np.random.default_rng(0)
    start, change = random.normal(1, 1, 100), random.normal(0, 4, 100)
    line = [start + alpha * (change - change.mean() + slope) + 8 * alpha * (1 - alpha) for alpha in ALPHAS]
    assert choose(line) == kept


@pytest.mark.parametrize(("errors", "kept"), [(0.2, 0), (0.3, 8)])
def test_the_start_is_left_only_for_a_gain_of_a_quarter_of_a_standard_error(errors: float, kept: int) -> None:
    change = np.random.default_rng(0).normal(0, 1, 60)
    change -= change.mean() + errors * change.std() / 60**0.5
    assert choose([1 + alpha * change for alpha in ALPHAS]) == kept


def test_a_line_without_any_change_keeps_the_start() -> None:
    assert choose([np.ones(5)] * len(ALPHAS)) == 0


def test_points_that_are_not_finite_are_ruled_out() -> None:
    every = losses(1.0, depth=10.0)
    every[7:] = [np.full(200, np.inf)] * 4
    assert choose(every) == 6


@pytest.fixture
def tuned(project: Project) -> Project:
    project.set("finetune.lr", 1e-3)
    project.set("finetune.epochs", 3)
    project.build()
    assert project.run("train_head", "finetune") == 0
    return project


def alpha_of(project: Project) -> float:
    folder = project.path("metrics/finetune")
    return read_kept(folder, read_history(folder))[1]


def test_the_checkpoint_lies_on_the_line_and_nothing_frozen_has_moved(tuned: Project) -> None:
    head, kept = (load_file(tuned.checkpoint(name)) for name in ("head", "finetuned"))
    alpha = alpha_of(tuned)
    assert 0 < alpha < 1
    tuned.set("finetune.select", "last")
    assert tuned.run("finetune") == 0
    end = load_file(tuned.checkpoint("finetuned"))
    network, _ = load_checkpoint(tuned.checkpoint("head"))
    batchnorm = {
        f"{name}.{key}"
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        for key in module.state_dict()
    }
    changed = [key for key in head if not torch.equal(head[key], end[key])]
    assert changed
    assert batchnorm.isdisjoint(changed)
    for key, tensor in head.items():
        expected = torch.lerp(tensor, end[key], alpha) if key in changed else tensor
        assert torch.equal(kept[key], expected), key


def test_the_history_records_the_kept_point(tuned: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuned.run("finetune") == 0
    folder = tuned.path("metrics/finetune")
    alpha, points, epochs = alpha_of(tuned), read_table(folder / "line.csv", Point, "finetune"), read_history(folder)
    assert [point.alpha for point in points] == list(ALPHAS)
    assert points[0].val_loss == pytest.approx(epochs[0].val_loss, abs=1e-6)
    assert points[-1].val_loss == pytest.approx(epochs[-1].val_loss, abs=1e-6)
    assert f"kept {alpha:.0%} of the change" in capsys.readouterr().out
    assert tuned.run("evaluate", "plot") == 0
    assert (
        f"Fine-tuning: kept {alpha:.0%} of the change; validation loss" in tuned.path("metrics/report.md").read_text()
    )


@pytest.mark.parametrize(("head", "smoothing"), [("pooled", 0.0), ("flatten", 0.0), ("pooled", 0.4), ("flatten", 0.4)])
def test_the_temperature_changes_as_validation_asks_and_falls_only_after_training_on_soft_labels(
    project: Project, head: str, smoothing: float
) -> None:
    project.set("model.head", head)
    project.set("finetune.lr", 1e-3)
    project.set("finetune.label_smoothing", smoothing)
    project.build()
    assert project.run("train_head", "finetune") == 0
    before, kept = (load_checkpoint(project.checkpoint(name))[1].temperature for name in ("head", "finetuned"))
    points = {
        point.alpha: point.temperature
        for point in read_table(project.path("metrics/finetune/line.csv"), Point, "finetune")
    }
    # That of a head that was found is fitted to more images than these.
    assert (before == pytest.approx(points[0.0], rel=1e-3)) == (head == "flatten")
    asked = points[alpha_of(project)]
    ratio = asked / points[0.0]
    assert ratio < 1
    assert kept == pytest.approx(max(asked, before * (ratio if smoothing else 1.0)), rel=1e-9)


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_the_temperature_rises_as_validation_asks_and_is_never_below_what_it_asks_for(
    project: Project, monkeypatch: pytest.MonkeyPatch, start: float
) -> None:
    project.set("finetune.lr", 1e-3)
    project.build()
    assert project.run("train_head") == 0

    def finish_from_another_temperature(output, network, description, fit, *others, **options) -> None:
        epochs = [replace(fit.epochs[0], temperature=start), *fit.epochs[1:]]
        description = replace(description, temperature=0.5)
        finish(output, network, description, replace(fit, epochs=epochs), *others, **options)

    monkeypatch.setattr(finetune, "finish", finish_from_another_temperature)
    assert project.run("finetune") == 0
    kept = load_checkpoint(project.checkpoint("finetuned"))[1].temperature
    points = read_table(project.path("metrics/finetune/line.csv"), Point, "finetune")
    asked = next(point.temperature for point in points if point.alpha == alpha_of(project))
    assert 0.5 < asked < 10  # below the ratio from the low start, above what the high one would give
    assert kept == pytest.approx(0.5 * asked / start if start < 1 else asked, rel=1e-9)


def test_without_validation_images_the_end_is_kept_and_reported(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.set("split.val_size", 0.0)
    project.build()
    assert project.run("train_head", "finetune") == 0
    assert "no validation images: the end of the schedule is kept" in capsys.readouterr().out
    assert read_table(project.path("metrics/finetune/line.csv"), Point, "finetune") == []
    assert alpha_of(project) == 1


def test_fine_tuning_passes_the_groups_of_validation_images_to_the_line(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.set("split.group", r"(\d)\.png")
    told: list[np.ndarray] = []
    monkeypatch.setattr(loop, "choose", lambda _, groups: told.append(groups) or 0)
    assert project.run("split", "build_model", "train_head", "finetune") == 0
    names = [entry.group for entry in project.parts()["val"]]
    assert 1 <= len(set(names)) < len(names)
    assert [list(told[0]).index(number) for number in told[0]] == [names.index(name) for name in names]
