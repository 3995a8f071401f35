"""The trainer's rules: which epoch is kept, when it stops, what it optimizes, how it fails."""

import fcntl
import json
import os
import re
import struct
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch
from conftest import Project
from safetensors.torch import load_file
from sklearn.metrics import log_loss
from torch import Tensor, nn

from stages.common.params import Phase
from stages.network import objective
from stages.network.network import Network, build_network, set_trainable, stock_model
from stages.scores.metrics import score
from stages.training.history import Epoch, read_history
from stages.training.trainer import Scores, Trainer, predict


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

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.images, torch.tensor([0, 1, 0, 1])


class Scripted(Trainer):
    """A trainer whose validation losses are given, and which remembers the head after each epoch."""

    def __init__(self, losses: list[float]) -> None:
        torch.manual_seed(0)
        network = build_network(stock_model("mobilenet_v3_small"), "pooled", 4, outputs=1, image_size=32)
        set_trainable(network, 0)
        super().__init__(network, torch.device("cpu"))
        self.losses, self.heads = iter(losses), list[Tensor]()

    def evaluate(self, batches: object) -> Scores:
        self.heads.append(self.network.classifier[-1].weight.detach().clone())
        return Scores(next(self.losses), 0.5)


LOSSES = [0.9, 0.7, 0.8, 0.6, 0.7, 0.7]


def fit(trainer: Trainer, phase: Phase) -> tuple[object, list[Epoch]]:
    history: list[Epoch] = []
    result = trainer.fit(OneBatch(), OneBatch(), phase, history.append)
    return result, history


@pytest.mark.parametrize(("select", "number"), [("best", 4), ("last", 6)])
def test_the_selected_epochs_weights_are_kept(select: str, number: int) -> None:
    trainer = Scripted(LOSSES)
    result, history = fit(trainer, make_phase(select=select))
    assert result.selected == history[number - 1]
    assert torch.equal(trainer.network.classifier[-1].weight, trainer.heads[number - 1])
    assert not torch.equal(trainer.heads[3], trainer.heads[5])


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 6), (None, 6)])
def test_patience_counts_the_epochs_without_a_lower_validation_loss(patience: int | None, epochs: int) -> None:
    _, history = fit(Scripted(LOSSES), make_phase(patience=patience))
    assert len(history) == epochs


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_validation_loss_that_is_not_finite_ends_training_and_keeps_the_best_epoch(loss: float) -> None:
    trainer = Scripted([0.9, 0.7, 0.8, loss])
    result, history = fit(trainer, make_phase())
    assert len(history) == 3
    assert result.selected.number == 2
    assert f"the validation loss after epoch 4 is {loss}" in result.failure
    assert torch.equal(trainer.network.classifier[-1].weight, trainer.heads[1])


@pytest.mark.parametrize("unfreeze", [0, 1, 13])
def test_the_optimizer_has_exactly_the_trainable_tensors(monkeypatch: pytest.MonkeyPatch, unfreeze: int) -> None:
    given: list[Tensor] = []
    make = torch.optim.Adam.__init__

    def spy(self: torch.optim.Adam, parameters: list[Tensor], **options: object) -> None:
        given.extend(parameters)
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
        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return real(logits, labels) * (float("nan") if calls > limit else 1)

        monkeypatch.setattr(objective, "loss", loss)

    return arrange


def test_a_loss_that_explodes_at_once_stops_the_stage_and_names_the_step(
    project: Project, refusal: Callable[[Project, str], str], explode_after: Callable[[int], None]
) -> None:
    assert project.run("split", "build_model") == 0
    explode_after(2)
    line = refusal(project, "train_head")
    assert "the training loss at step 3 of epoch 1 is nan" in line
    assert "lr is too high (now 0.001)" in line
    assert not project.checkpoint("head").exists()


def test_a_loss_that_explodes_later_leaves_the_best_checkpoint(
    project: Project, refusal: Callable[[Project, str], str], explode_after: Callable[[int], None]
) -> None:
    assert project.run("split", "build_model") == 0
    explode_after(2 * (4 + 1) + 1)  # two epochs of four training batches and a validation batch, and a step
    project.set("train_head.epochs", 5)
    line = refusal(project, "train_head")
    assert "the training loss at step 2 of epoch 3 is nan" in line
    kept = json.loads(project.path("metrics/train_head/metrics.json").read_text())["selected_epoch"]
    assert f"head.safetensors keeps epoch {kept}" in line
    assert all(tensor.isfinite().all() for tensor in load_file(project.checkpoint("head")).values())


def test_in_a_terminal_the_bar_of_each_epoch_ends_with_its_results(project: Project) -> None:
    assert project.run("split", "build_model") == 0
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
    for epoch in history:
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
    trainer = Trainer(network, torch.device("cpu"))
    batches = list(zip(logits[..., None, None].split(40), labels.split(40), strict=True))
    scores = trainer.evaluate(batches)  # type: ignore[arg-type]
    probabilities = predict([trainer], batches)[0].numpy()  # type: ignore[arg-type]
    expected = score(labels.numpy(), probabilities, [str(label) for label in range(probabilities.shape[1])])
    assert scores.accuracy == pytest.approx(expected.accuracy, abs=1e-6)
    assert scores.loss == pytest.approx(expected.loss, abs=1e-6)
    assert ((probabilities.argmax(axis=1) == labels.numpy()).mean()) == pytest.approx(expected.accuracy)
