"""Mixup: what is mixed, in which shares, and that a stopped run goes on with the same."""

import pytest
import torch
from conftest import Project, make_images
from test_features import no_decoding
from test_resume import PLACES, outputs, run_killed
from torch import nn

from stages.common.params import Phase
from stages.network import objective
from stages.network.network import Network
from stages.training.batches import Part
from stages.training.history import read_history
from stages.training.loop import Trainer, mix

__all__ = ["no_decoding"]

pytestmark = pytest.mark.usefixtures("cold_cache")


@pytest.fixture
def built(project: Project) -> Project:
    project.set("train_head.epochs", 4)
    project.build()
    return project


def test_a_killed_run_resumes_with_the_same_mixtures(built: Project, capsys: pytest.CaptureFixture[str]) -> None:
    built.set("train_head.mixup", 0.4)
    assert built.run("train_head") == 0
    whole = outputs(built, "train_head")
    run_killed(built, "train_head", *PLACES["between two epochs"][:3])
    capsys.readouterr()
    assert built.run("train_head") == 0
    assert "resuming after epoch 2" in capsys.readouterr().out
    assert outputs(built, "train_head") == whole


def test_mixup_mixes_inputs_and_labels_in_the_same_proportion() -> None:
    torch.manual_seed(0)
    inputs, labels = torch.eye(6), torch.arange(6)
    shares = []
    for _ in range(50):
        mixed, others, share = mix(Part(inputs, labels, range(6), 6), 0.4)
        assert torch.allclose(mixed, share * inputs + (1 - share) * inputs[others], atol=1e-6)
        assert sorted(others.tolist()) == labels.tolist()
        shares.append(share)
    assert 0.5 <= min(shares) < 0.7 < max(shares) <= 1


@pytest.mark.parametrize("classes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_mixup_trains_two_and_many_classes(project: Project, classes: int) -> None:
    if classes == 3:
        make_images(project.path("images"), ("cat", "dog", "horse"))
    project.build()
    assert project.run("train_head") == 0
    plain = read_history(project.path("metrics/train_head"))
    project.set("train_head.mixup", 1.0)
    assert project.run("train_head") == 0
    mixed = read_history(project.path("metrics/train_head"))
    assert mixed[0].val_loss == plain[0].val_loss
    assert all(one.train_loss != other.train_loss for one, other in zip(plain[1:], mixed[1:], strict=True))


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_step_with_mixup_learns_from_both_labels_in_proportion(outputs: int) -> None:
    torch.manual_seed(0)
    network = Network(nn.Sequential(), nn.Sequential(nn.Linear(4, outputs)))
    inputs, labels = torch.randn(6, 4), torch.arange(6) % max(outputs, 2)
    phase = Phase(
        epochs=1, batch_size=6, lr=1e-3, weight_decay=0.0, augment="none", select="best", patience=None, mixup=0.4
    )
    torch.manual_seed(5)
    mixed, others, share = mix(Part(inputs, labels, range(6), 6), 0.4)
    with torch.no_grad():
        logits = network(mixed)
        both = share * objective.loss(logits, labels) + (1 - share) * objective.loss(logits, others)
    assert both != pytest.approx(objective.loss(logits, labels).item(), abs=1e-3)
    torch.manual_seed(5)
    trainer = Trainer(network, torch.device("cpu"))
    loss, _ = trainer.step(Part(inputs, labels, range(6), 6), torch.optim.SGD(network.parameters(), lr=0.1), phase)
    assert loss.item() == pytest.approx(both.item(), abs=1e-6)
