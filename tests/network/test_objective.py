"""The loss: smoothed labels, and classes that weigh more than others."""

import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Project
from dvc.utils.hydra import apply_overrides
from PIL import Image
from sklearn.metrics import log_loss
from torch import Tensor

from stages.common.cli import StageError
from stages.common.files import read_table
from stages.images.index import Entry
from stages.network import objective
from stages.scores.evaluation import ClassScores
from stages.training.history import read_history


def some(classes: int, count: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, objective.outputs_for(classes), generator=generator, dtype=torch.float64) * 3
    return logits, torch.randint(classes, (count,), generator=generator)


def entries(**counts: int) -> list[Entry]:
    names = sorted(counts)
    return [
        Entry(f"{name}/{number}.png", names.index(name), name, f"{name}{number}")
        for name in names
        for number in range(counts[name])
    ]


@pytest.mark.parametrize("classes", [2, 5])
def test_a_smoothed_loss_is_that_of_partly_uniform_labels(classes: int) -> None:
    logits, labels = some(classes)
    probabilities = objective.probabilities(logits)
    targets = torch.eye(classes, dtype=torch.float64)[labels] * 0.9 + 0.1 / classes
    expected = -(targets * probabilities.log()).sum(dim=1).mean().item()
    assert objective.loss(logits, labels, label_smoothing=0.1).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("classes", [2, 5])
def test_a_weighted_loss_counts_each_image_by_the_weight_of_its_class(classes: int) -> None:
    logits, labels = some(classes)
    weights = torch.linspace(0.5, 2, classes, dtype=torch.float64)
    counted = weights[labels].numpy()
    mean = log_loss(labels, objective.probabilities(logits), labels=list(range(classes)), sample_weight=counted)
    assert objective.loss(logits, labels, weights).item() == pytest.approx(mean * counted.mean(), abs=1e-9)
    equal = objective.loss(logits, labels, torch.ones(classes, dtype=torch.float64))
    assert equal.item() == pytest.approx(objective.loss(logits, labels).item(), abs=1e-12)


def test_balanced_weights_count_each_class_the_same_and_have_a_mean_of_one() -> None:
    train = entries(cat=10, dog=500, owl=90)
    weights = objective.weigh_classes("balanced", train)
    assert weights is not None
    assert (weights * torch.tensor([10, 500, 90])).tolist() == pytest.approx([200, 200, 200])


def test_weights_by_name_keep_their_proportions_and_have_a_mean_of_one() -> None:
    train = entries(cat=1, dog=3)
    weights = objective.weigh_classes({"dog": 1, "cat": 5}, train)
    assert weights is not None
    assert weights.tolist() == pytest.approx([2.5, 0.5])
    assert objective.weigh_classes(None, train) is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cat": 2.0}, "class_weights: no weight for dog; each class needs one"),
        ({"cat": 2.0, "dog": 1.0, "Dog": 1.0}, "class_weights: no class is named Dog; there are cat, dog"),
    ],
)
def test_a_class_without_a_weight_and_a_weight_without_a_class_are_refused(
    weights: dict[str, float], message: str, project: Project, refusal: Callable[[Project, str], str]
) -> None:
    with pytest.raises(StageError, match=message):
        objective.weigh_classes(weights, entries(cat=1, dog=1))
    project.build()
    project.set("class_weights", weights)
    assert message in refusal(project, "train_head")


def test_weights_given_on_the_command_line_replace_the_earlier_ones_and_are_printed(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"cat": "犬", "dog": unicodedata.normalize("NFD", "Löwe = big")}
    for old, new in names.items():
        project.path(f"images/{old}").rename(project.path(f"images/{new}"))
    for start in (None, ["cat=1"]):
        project.set("class_weights", start)
        composed = unicodedata.normalize("NFC", names["dog"])
        apply_overrides(project.path("params.yaml"), [f'class_weights=["犬=3","{composed}=1e0"]'])
        project.params = yaml.safe_load(project.path("params.yaml").read_text(encoding="utf-8"))
        project.build()
        assert project.run("train_head") == 0
        assert f"class weights: {names['dog']} 0.5, 犬 1.5" in capsys.readouterr().out


def test_a_class_may_be_named_by_a_number(project: Project) -> None:
    for number, name in enumerate(("cat", "dog")):
        project.path(f"images/{name}").rename(project.path(f"images/{number}"))
    project.set("class_weights", {0: 2.0, 1: 1.0})
    project.build()
    assert project.run("train_head") == 0


@pytest.fixture
def rare(project: Project) -> Project:
    """Twenty images of a rare class whose colours overlap with those of the 200 others."""
    noise = np.random.default_rng(0)
    for name, count, shift in (("cat", 20, 12), ("dog", 200, 0)):
        for number in range(count):
            pixels = noise.integers(0, 200, (40, 40, 3)).astype(float) + noise.normal(0, 12, 3)
            pixels[..., 0] += shift
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(project.path(f"images/{name}/{number:03d}.png"))
    project.set("split.test_size", 0.3)
    project.set("train_head.epochs", 8)
    return project


def test_the_validation_loss_is_weighted_like_the_training_loss(project: Project) -> None:
    project.build()
    starts = []
    for weights in (None, {"cat": 1.0, "dog": 1.0}, {"cat": 9.0, "dog": 1.0}):
        project.set("class_weights", weights)
        assert project.run("train_head") == 0
        starts.append(read_history(project.path("metrics/train_head"))[0].val_loss)
    assert starts[1] == pytest.approx(starts[0], abs=1e-6)
    assert abs(starts[2] - starts[0]) > 1e-3


@pytest.mark.slow
def test_a_rare_class_is_found_more_often_with_balanced_weights(
    rare: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rare.run("split", "build_model") == 0
    recalls: dict[object, Any] = {}
    for weights in (None, "balanced"):
        rare.set("class_weights", weights)
        assert rare.run("train_head", "finetune", "evaluate", "plot") == 0
        (cat,) = (
            scores
            for scores in read_table(rare.path("metrics/classes.csv"), ClassScores, "evaluate")
            if scores.class_name == "cat"
        )
        recalls[weights] = cat.finetuned_recall
        said = "Training and validation losses are weighted by class (`class_weights`: `balanced`)"
        assert (said in rare.path("metrics/report.md").read_text()) is (weights == "balanced")
    assert recalls["balanced"] >= recalls[None] + 0.3
