"""The trainer's rules: which epoch is kept, when it stops, what it optimizes, how it fails."""

import fcntl
import os
import re
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Project
from safetensors.torch import load_file
from sklearn.metrics import log_loss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stages.common.cli import StageError
from stages.common.params import Phase
from stages.network import objective
from stages.network.backbones import stock_model
from stages.network.network import Network, build_network, set_trainable
from stages.scores.metrics import score
from stages.training import resume
from stages.training.batches import Part
from stages.training.history import Epoch, read_history, read_kept, still_falling
from stages.training.loop import Fit, Scores, Trainer, predict
from stages.training.resume import StateFile


def make_phase(**changes: object) -> Phase:
    optimizer = {"batch_size": 4, "lr": 1e-3, "weight_decay": 0.0}
    return Phase.model_validate(
        {"epochs": 6, "augment": "none", "select": "best", "patience": None, **optimizer, **changes}
    )


class OneBatch:
    """The smallest `Inputs`."""

    def __init__(self) -> None:
        self.images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return 1

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[Part]:
        yield Part(self.images, torch.tensor([0, 1, 0, 1]), range(4), 4)


class Scripted(Trainer):
    """A trainer whose validation losses are given, and which remembers the head after each epoch."""

    def __init__(self, losses: list[float]) -> None:
        torch.manual_seed(0)
        network = build_network(stock_model("mobilenet_v3_small"), "pooled", 4, outputs=1, image_size=32)
        set_trainable(network, 0)
        super().__init__(network, torch.device("cpu"))
        # The first is that of the network as it is.
        self.losses, self.heads = iter([START, *losses]), list[Tensor]()

    def evaluate(self, batches: object) -> Scores:
        self.heads.append(self.network.classifier[-1].weight.detach().clone())
        return Scores(next(self.losses), 0.5)


START = 0.65
LOSSES = [0.9, 0.7, 0.8, 0.6, 0.7, 0.7]


def fit(trainer: Trainer, phase: Phase, **options: object) -> tuple[Fit, list[Epoch]]:
    history: list[Epoch] = []
    result = trainer.fit(OneBatch(), OneBatch(), phase, history.append, **options)
    return result, history


@pytest.mark.parametrize(
    ("losses", "options", "keep_start", "selected", "last"),
    [
        (LOSSES, {}, False, 4, 6),
        (LOSSES, {"select": "last"}, False, 6, 6),
        (LOSSES, {"patience": 1}, False, 2, 3),
        (LOSSES, {"patience": 2}, False, 4, 6),
        (LOSSES, {"patience": 3}, True, 0, 3),  # counted from the start
        ([0.9, 0.7, 0.8], {}, True, 0, 3),
        ([0.9, 0.7, 0.8], {}, False, 2, 3),
        ([0.9, 0.7, 0.8], {"select": "last"}, True, 3, 3),
        ([START, START], {}, True, 0, 2),  # not replaced by what only equals it
    ],
)
def test_the_selected_epoch_gives_the_weights(
    losses: list[float], options: dict[str, object], keep_start: bool, selected: int, last: int
) -> None:
    trainer = Scripted(losses)
    result, history = fit(trainer, make_phase(epochs=len(losses), **options), keep_start=keep_start)
    assert history[0] == Epoch(0, None, None, START, 0.5)
    assert [epoch.number for epoch in history] == list(range(last + 1))
    assert result.selected == history[selected]
    assert torch.equal(trainer.network.classifier[-1].weight, trainer.heads[selected])
    assert not torch.equal(trainer.heads[selected], trainer.heads[selected - 1])


@pytest.mark.parametrize(
    ("losses", "patience", "falling"),
    [
        ([0.9, 0.8, 0.7], None, True),
        ([0.9, 0.7, 0.8], None, False),
        ([0.9, 0.7, 0.8], 2, True),
        ([0.7, 0.8, 0.9], 2, False),
        ([0.9, 0.8], None, False),  # ended before its three epochs
        ([0.9, 4e-5, 3e-5], None, False),  # shown as 0.0000
    ],
)
def test_a_loss_is_still_falling_when_the_epochs_end_before_the_patience(
    losses: list[float], patience: int | None, falling: bool
) -> None:
    epochs = [Epoch(number, None, None, loss, 0.5) for number, loss in enumerate([0.1, *losses])]
    assert still_falling(epochs, 3, patience) is falling


@pytest.mark.parametrize(
    ("losses", "keep_start", "selected"),
    [([0.9, 0.7, 0.8, float("nan")], False, 2), ([0.9, 0.7, 0.8, float("inf")], False, 2), ([float("nan")], True, 0)],
)
def test_a_validation_loss_that_is_not_finite_ends_training_and_keeps_the_best_epoch(
    losses: list[float], keep_start: bool, selected: int
) -> None:
    trainer = Scripted(losses)
    result, history = fit(trainer, make_phase(), keep_start=keep_start)
    assert history[-1].number == len(losses) - 1
    assert result.selected.number == selected
    assert f"the validation loss after epoch {len(losses)} is {losses[-1]}" in result.failure
    assert torch.equal(trainer.network.classifier[-1].weight, trainer.heads[selected])


def test_a_network_whose_loss_is_not_finite_from_the_start_is_refused() -> None:
    trainer = Scripted([])
    trainer.losses = iter([float("nan")])
    with pytest.raises(StageError, match="the validation loss before the first epoch is nan: check the weights"):
        fit(trainer, make_phase())


@pytest.mark.parametrize("unfreeze", [0, 1, 13])
def test_the_optimizer_has_exactly_the_trainable_tensors(monkeypatch: pytest.MonkeyPatch, unfreeze: int) -> None:
    given: list[Tensor] = []
    make = torch.optim.Adam.__init__

    def spy(self: torch.optim.Adam, parameters: list[dict[str, list[Tensor]]], **options: object) -> None:
        given.extend(tensor for group in parameters for tensor in group["params"])
        assert options["amsgrad"] is True
        make(self, parameters, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.Adam, "__init__", spy)
    trainer = Scripted([0.5])
    set_trainable(trainer.network, unfreeze)
    fit(trainer, make_phase(epochs=1))
    trainable = [parameter for parameter in trainer.network.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in given} == {id(parameter) for parameter in trainable}
    assert len(given) == len(trainable) > 0


def test_evaluation_changes_no_tensor() -> None:
    trainer = Scripted([])
    before = {key: tensor.clone() for key, tensor in trainer.network.state_dict().items()}
    Trainer.evaluate(trainer, OneBatch())
    assert all(torch.equal(tensor, before[key]) for key, tensor in trainer.network.state_dict().items())


@pytest.fixture
def explode_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the loss be NaN from some call on."""
    real, calls = objective.loss, 0

    def arrange(limit: int) -> None:
        def loss(*arguments: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return real(*arguments) * (float("nan") if calls > limit else 1)

        monkeypatch.setattr(objective, "loss", loss)

    return arrange


def test_a_loss_that_explodes_at_once_fails_and_names_the_step(
    project: Project, refusal: Callable[[Project, str], str], explode_after: Callable[[int], None]
) -> None:
    project.build()
    explode_after(2)  # two steps
    line = refusal(project, "train_head")
    assert "the training loss at step 3 of epoch 1 is nan" in line
    assert "lr is too high (now 0.001)" in line
    assert not project.checkpoint("head").exists()


def test_a_loss_that_explodes_later_leaves_the_best_checkpoint(
    project: Project, refusal: Callable[[Project, str], str], explode_after: Callable[[int], None]
) -> None:
    project.build()
    explode_after(2 * 4 + 1)  # two epochs of four training batches, and a step
    project.set("train_head.epochs", 5)
    line = refusal(project, "train_head")
    assert "the training loss at step 2 of epoch 3 is nan" in line
    folder = project.path("metrics/train_head")
    kept, _ = read_kept(folder, read_history(folder))
    assert f"head.safetensors keeps epoch {kept}" in line
    assert all(tensor.isfinite().all() for tensor in load_file(project.checkpoint("head")).values())


def test_fine_tuning_that_explodes_keeps_the_head_checkpoint_and_says_so(
    project: Project, explode_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    project.build()
    assert project.run("train_head") == 0
    explode_after(2)
    assert project.run("finetune") == 0
    printed = capsys.readouterr().out
    assert "training stopped: the training loss at step 3 of epoch 1 is nan" in printed
    assert "kept epoch 0 (val_loss 0." in printed
    assert "no epoch has a lower validation loss" in printed
    assert_same_tensors(project.checkpoint("head"), project.checkpoint("finetuned"))
    assert project.run("evaluate", "plot") == 0
    assert "where the loss was no longer finite: lower `finetune.lr`" in project.path("metrics/report.md").read_text()


def test_fine_tuning_that_explodes_is_refused_where_the_last_epoch_is_asked_for(
    project: Project, refusal: Callable[[Project, str], str], explode_after: Callable[[int], None]
) -> None:
    project.build()
    assert project.run("train_head") == 0
    project.set("finetune.select", "last")
    explode_after(4 + 2)
    assert "finetuned.safetensors keeps epoch 1" in refusal(project, "finetune")


def assert_same_tensors(first: Path, second: Path) -> None:
    tensors, others = load_file(first), load_file(second)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


def test_fine_tuning_that_lowers_nothing_ends_with_the_head_checkpoint_and_says_so_everywhere(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.build()
    assert project.run("train_head") == 0
    project.set("finetune.lr", 1)
    project.set("finetune.unfreeze", 13)
    assert project.run("finetune", "evaluate", "plot") == 0
    printed = capsys.readouterr().out
    assert "no epoch has a lower validation loss" in printed
    assert "Fine-tuning changed nothing: both checkpoints are the same network." in printed
    assert_same_tensors(project.checkpoint("head"), project.checkpoint("finetuned"))
    folder = project.path("metrics/finetune")
    assert read_kept(folder, read_history(folder)) == (0, 0)
    report = project.path("metrics/report.md").read_text()
    assert "Fine-tuning: kept epoch 0, the head checkpoint: no epoch lowered the validation loss." in report
    # The point of epoch 0 is that of the head phase's kept epoch.
    head, finetune = (read_history(project.path(f"metrics/{phase}")) for phase in ("train_head", "finetune"))
    best = min(head[1:], key=lambda epoch: epoch.val_loss)
    assert finetune[0].val_loss == pytest.approx(best.val_loss, abs=1e-6)
    assert [epoch.number for epoch in head] == [0, 1, 2]


def test_a_head_phase_that_is_cut_short_by_its_epochs_says_so(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.set("train_head.lr", 1e-4)
    project.set("train_head.patience", None)
    project.build()
    assert project.run("train_head") == 0
    assert "still falling after all 2 epochs: raise train_head.epochs" in capsys.readouterr().out


def test_in_a_terminal_the_bar_of_each_epoch_ends_with_its_results(project: Project) -> None:
    project.build()
    terminal, side = os.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = project.start("train_head", stderr=side)
    os.close(side)
    shown = b""
    with suppress(OSError):  # the end of a terminal that nobody writes to
        while chunk := os.read(terminal, 4096):
            shown += chunk
    printed, _ = process.communicate()
    os.close(terminal)
    assert process.returncode == 0
    history = read_history(project.path("metrics/train_head"))
    lines = re.split(r"[\r\n]+", shown.decode())
    for epoch in history[1:]:
        results = f"train_loss {epoch.train_loss:.4f}  val_loss {epoch.val_loss:.4f}  accuracy {epoch.accuracy:.2%}"
        assert [line for line in lines if line.startswith(f"epoch {epoch.number}/2: 100%") and results in line]
    assert "train_loss" not in printed


@pytest.mark.parametrize("classes", [2, 5])
def test_loss_and_probabilities_agree_with_scikit_learn(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, objective.outputs_for(classes), generator=generator, dtype=torch.float64) * 5
    labels = torch.randint(classes, (50,), generator=generator)
    probabilities = objective.probabilities(logits)
    assert probabilities.shape == (50, classes)
    assert torch.allclose(probabilities.sum(1), torch.ones(50, dtype=torch.float64))
    expected = log_loss(labels, probabilities, labels=list(range(classes)))
    assert objective.loss(logits, labels).item() == pytest.approx(expected, abs=1e-9)


def test_a_small_probability_is_not_rounded_to_zero() -> None:
    assert objective.probabilities(torch.tensor([[60.0]], dtype=torch.float64))[0, 0] == pytest.approx(
        8.7565e-27, rel=1e-3
    )


@pytest.mark.parametrize("outputs", [1, 3])
def test_torchevals_scores_equal_scikit_learns_for_logits_near_the_threshold(outputs: int) -> None:
    network = Network(nn.Sequential(nn.Flatten()), nn.Sequential(nn.Linear(outputs, outputs, bias=False)))
    torch.nn.init.eye_(network.classifier[0].weight)
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(90, outputs, generator=generator) - 0.4
    labels = torch.randint(max(outputs, 2), (90,), generator=generator)
    trainer = Trainer(network, torch.device("cpu"), tempered=False)
    parts = zip(logits[..., None, None].split(40), labels.split(40), strict=True)
    batches = [Part(*part, range(len(part[1])), len(part[1])) for part in parts]
    scores = trainer.evaluate(batches)  # type: ignore[arg-type]
    probabilities = objective.probabilities(predict([trainer], batches)[0]).numpy()  # type: ignore[arg-type]
    expected = score(labels.numpy(), probabilities)
    assert scores.accuracy == pytest.approx(expected.accuracy, abs=1e-6)
    assert scores.loss == pytest.approx(expected.loss, abs=1e-6)
    assert ((probabilities.argmax(axis=1) == labels.numpy()).mean()) == pytest.approx(expected.accuracy)


class NoFloat64(TorchDispatchMode):
    """Apple's GPUs have no 64-bit floats: a tensor of them, made while this is on, is an error."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            assert not isinstance(tensor, Tensor) or tensor.dtype != torch.float64, func
        return made


@pytest.mark.usefixtures("cold_cache")
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_training_evaluating_and_resuming_make_no_tensor_of_64_bit_floats(
    outputs: int, optimizer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    keys = {"optimizer": optimizer, "clip_norm": 1.0, "label_smoothing": 0.1, "schedule": "cosine"}
    networks = [build_network(stock_model("mobilenet_v3_small"), "pooled", 4, outputs, 32) for _ in range(2)]
    with NoFloat64():
        for epochs, network in zip((2, 3), networks, strict=True):
            set_trainable(network, 1)
            trainer = Trainer(network, torch.device("cpu"), class_weights=torch.ones(max(outputs, 2)))
            state = StateFile(trainer.device, 1.0, [outputs, optimizer])
            fit(trainer, make_phase(epochs=epochs, **keys), state=state)
            trainer.logits(OneBatch().images)
    assert "resuming after epoch 1" in capsys.readouterr().out


def test_a_validation_loss_of_exactly_0_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    network = build_network(stock_model("mobilenet_v3_small"), "pooled", 4, outputs=1, image_size=32)
    with torch.no_grad():
        network.classifier[-1].weight.zero_()
        network.classifier[-1].bias.fill_(-200.0)
    batch = Part(OneBatch().images, torch.zeros(4, dtype=torch.int64), range(4), 4)
    assert Trainer(network, torch.device("cpu"), tempered=False).evaluate([batch]) == Scores(0.0, 1.0)
    assert caplog.text == ""


@pytest.mark.parametrize("step", [1, 30, 50, 51, 60])
def test_a_loss_that_is_not_finite_is_named_by_its_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sixty(OneBatch):
        def __len__(self) -> int:
            return 60

        def __iter__(self) -> Iterator[Part]:
            for _ in range(60):
                yield from super().__iter__()

    real, steps = objective.loss, 0

    def explode(logits: Tensor, *arguments: Any) -> Tensor:
        nonlocal steps
        steps += 1
        return real(logits, *arguments) * (float("nan") if steps >= step else 1.0)

    monkeypatch.setattr(objective, "loss", explode)
    trainer = Scripted(LOSSES)
    before = trainer.network.classifier[-1].weight.detach().clone()
    result = trainer.fit(Sixty(), OneBatch(), make_phase(epochs=2), lambda _: None, keep_start=True)
    assert result.failure is not None
    assert result.failure.startswith(f"the training loss at step {step} of epoch 1 is nan")
    assert steps <= 60
    assert torch.equal(trainer.network.classifier[-1].weight, before)
