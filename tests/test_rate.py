"""The rate finder: what it suggests, when it suggests nothing, and that it leaves all else as it was."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Project
from PIL import Image
from torch import nn
from training.test_training import OneBatch, Scripted, make_phase

from stages import rate
from stages.common import stage as command
from stages.common.params import Phase
from stages.common.stage import StageError
from stages.network.network import Network, set_trainable
from stages.training.inputs import Part
from stages.training.rate_finder import Sweep, advise, sweep_rates, valley
from stages.training.trainer import Trainer

RATES = np.logspace(-7, 0, 100)


def falling(first: float = 1e-5, last: float = 1e-2, explosion: float = 1e-1) -> np.ndarray:
    """0.7 down to 0.1 between two rates, evenly on the logarithmic scale; then up."""
    losses = np.interp(np.log10(RATES), np.log10([first, last]), [0.7, 0.1])
    return np.where(explosion < RATES, 0.1 + 20 * (RATES - explosion), losses)


def noise(size: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, size, len(RATES))


def test_the_suggestion_is_two_thirds_into_the_fall_on_the_logarithmic_scale() -> None:
    found = valley(RATES, falling())
    first, last = 10**-4.7, 10**-2.3  # after a tenth of three decades, and a tenth before their end
    assert found.first == pytest.approx(first, rel=0.2)
    assert found.last == pytest.approx(last, rel=0.2)
    assert found.suggestion == pytest.approx(first * (last / first) ** (2 / 3), rel=0.2)


def test_noise_does_not_break_the_stretch() -> None:
    found = valley(RATES, falling() + noise(0.005))
    assert found.suggestion == pytest.approx(valley(RATES, falling()).suggestion, rel=0.3)


def test_rates_that_hardly_move_the_loss_do_not_move_the_suggestion() -> None:
    losses = falling() - 1e-6 * np.arange(len(RATES))  # falls at all rates, but not so that it can be seen
    expected = pytest.approx(valley(RATES, falling()).suggestion, rel=0.2)
    assert valley(RATES, losses).suggestion == valley(RATES[20:], losses[20:]).suggestion == expected


def test_losses_that_are_not_finite_are_in_no_stretch() -> None:
    losses = falling()
    losses[-3:] = float("inf"), float("nan"), float("nan")
    assert valley(RATES, losses) == valley(RATES[:-3], losses[:-3])


@pytest.mark.parametrize(
    "losses",
    [
        np.full(100, 0.3),
        0.3 + noise(0.002),
        np.linspace(0.1, 2, 100),
        np.linspace(0.1, 0.099, 100),
        0.001 + 0.0002 * np.sin(np.linspace(0, 20, 100)) - 1e-6 * np.arange(100),
        np.array([0.1]),
        np.array([float("nan")]),
        np.array([]),
    ],
    ids=["flat", "flat and noisy", "only rising", "hardly falling", "up and down", "one", "nan", "none"],
)
def test_without_a_fall_there_is_no_suggestion(losses: np.ndarray) -> None:
    assert valley(RATES[: len(losses)], losses) is None


def trainer() -> Scripted:
    return Scripted([])


class Watched(OneBatch):
    """Remembers its epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def test_a_phase_of_few_batches_goes_through_as_many_epochs_as_it_takes() -> None:
    inputs = Watched()
    sweep = sweep_rates(trainer(), inputs, make_phase())
    assert inputs.epochs[: len(sweep.rates)] == list(range(1, len(sweep.rates) + 1))
    assert sweep.rates == pytest.approx(RATES[: len(sweep.rates)])
    assert len(sweep.rates) == len(sweep.raw) == len(sweep.losses) > 50


def test_the_groups_rates_keep_their_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    subject = trainer()
    set_trainable(subject.network, 2)
    step = subject.step

    def spy(part: Part, optimizer: torch.optim.Optimizer, phase: Phase) -> object:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return step(part, optimizer, phase)

    monkeypatch.setattr(subject, "step", spy)
    sweep = sweep_rates(subject, OneBatch(), make_phase(lr=0.3), layer_decay=0.5)
    assert [rates[0] for rates in seen] == sweep.rates
    for rates in seen:
        assert rates == pytest.approx([rates[0], rates[0] / 2, rates[0] / 4])


def test_a_sweep_that_explodes_stops_early_and_suggests_a_rate_below() -> None:
    linear = Network(nn.Sequential(nn.Flatten()), nn.Sequential(nn.Linear(3 * 32 * 32, 1)))
    inputs = OneBatch()
    inputs.images[3] = inputs.images[2]  # with another label: a loss that can be learnt down to zero cannot explode
    sweep = sweep_rates(Trainer(linear, torch.device("cpu")), inputs, make_phase(optimizer="sgd"))
    assert sweep.exploded
    assert len(sweep.rates) < 100
    assert not sweep.losses[-1] <= 4 * min(sweep.losses)
    assert valley(sweep.rates, sweep.losses).suggestion < sweep.rates[-1]


def test_a_loss_that_is_not_finite_at_the_first_step_is_refused() -> None:
    subject = trainer()
    subject.network.classifier[-1].weight.data.fill_(float("nan"))
    with pytest.raises(StageError, match="at the first step is nan: check the weights"):
        sweep_rates(subject, OneBatch(), make_phase())


def test_without_a_suggestion_it_says_why_and_what_to_do() -> None:
    sweep = Sweep([1e-3, 1e-2], [0.1, 5.0], [0.1, 5.0], exploded=True)
    line = advise("finetune", sweep, None)
    assert line.startswith("no suggestion: no rate lowers the training loss, 0.1 nats; ")
    assert "-S finetune.unfreeze=" in line
    assert line.endswith("or keep lr well below 1.0e-02, where it explodes")
    assert "model.weights" in advise("train_head", sweep, None)


def find_rate(project: Project, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        patch.setattr(sys, "argv", ["stages.rate", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            command.run(rate.main)
    return int(exit_info.value.code or 0)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("augment", ["none", pytest.param("light", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("phase", "stages"), [("train_head", ()), ("finetune", ("train_head",))])
def test_it_prints_what_to_paste_draws_a_figure_and_leaves_all_else_as_it_was(
    project: Project, capsys: pytest.CaptureFixture[str], phase: str, stages: tuple[str, ...], augment: str
) -> None:
    project.build()
    assert project.run(*stages) == 0
    project.set(f"{phase}.augment", augment)
    before = content(project.folder)
    capsys.readouterr()
    assert find_rate(project, phase) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("suggestion: ")]
    found = re.fullmatch(rf"suggestion: dvc exp run -S {phase}\.lr=(\d\.\de-\d\d)", line)
    assert found is not None
    assert 1e-7 < float(found[1]) < 1
    after = content(project.folder)
    figure = project.path(f"data/rate_{phase}.png")
    first = after.pop(figure)
    assert after == before
    with Image.open(figure) as picture:
        assert min(picture.size) > 400

    assert find_rate(project, phase, "--output", "other.png") == 0
    assert line in capsys.readouterr().out
    assert project.path("other.png").read_bytes() == first


def test_the_default_phase_is_fine_tuning_and_its_figure_is_not_for_git(project: Project) -> None:
    project.build()
    assert project.run("train_head") == 0
    assert find_rate(project) == 0
    assert project.path("data/rate_finetune.png").exists()
    assert "/data/rate_*.png" in (ROOT / ".gitignore").read_text().splitlines()


def test_without_a_checkpoint_it_refuses(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.build()
    capsys.readouterr()
    assert find_rate(project) == 1
    line = capsys.readouterr().err
    problem = "data/checkpoints/head.safetensors: no such checkpoint"
    assert line == f"error: {problem}; `dvc repro` makes the pipeline's own again\n"
    assert not project.path("data/rate_finetune.png").exists()


def test_what_the_head_phase_needs_next_is_kept_in_passing(project: Project, cold_cache: Path) -> None:
    project.build()
    assert find_rate(project, "train_head") == 0
    # For the head, for fine-tuning, and thumbnails.
    assert len([path for path in (cold_cache / "activations").iterdir() if path.is_dir()]) == 3
