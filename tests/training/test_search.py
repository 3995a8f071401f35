"""The head is found: planted data for which one kind of head has to win, and what follows from the folds."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, Project
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from stages.common.files import read_table
from stages.common.params import TrainHead, load_params
from stages.images.index import Entry
from stages.network.checkpoint import load_checkpoint
from stages.scores.suspects import find_suspects
from stages.training import search
from stages.training.heads import Data, train_hidden, train_linear
from stages.training.phase import Entries
from stages.training.search import FOLDS, Candidate, assign_folds, find_head


def phase() -> TrainHead:
    return load_params(ROOT / "params.yaml").train_head


def entries_of(labels: Tensor) -> list[Entry]:
    return [
        Entry(f"{number}.png", label, f"class {label}", f"{number:064x}")
        for number, label in enumerate(labels.tolist())
    ]


def find(features: Tensor, labels: Tensor, hidden: int = 64):
    """Half of the images to train on, a quarter for validation; the rest is left out."""
    entries, half, rest = entries_of(labels), len(labels) // 2, 3 * len(labels) // 4
    rows = {entry.path: row for entry, row in zip(entries, features, strict=True)}

    def read(some: list[Entry]) -> Iterator[Tensor]:
        for first in range(0, len(some), 100):
            yield torch.stack([rows[entry.path] for entry in some[first : first + 100]])

    known = Entries(entries[:half], entries[half:rest], watches_test=False)
    return find_head(read, known, hidden, phase(), None, 0, torch.device("cpu"))


def lines(count: int = 800, inputs: int = 40) -> tuple[Tensor, Tensor]:
    """Three classes by the largest of three noisy sums: nothing that is not linear helps."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, inputs, generator=generator)
    weights = torch.randn(inputs, 3, generator=generator)
    return features, (features @ weights + 4 * torch.randn(count, 3, generator=generator)).argmax(1)


def rings(count: int = 1600) -> tuple[Tensor, Tensor]:
    """Two classes by the distance from the middle: no line parts them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, 4, generator=generator)
    return features, (features[:, :2].norm(dim=1) > 1.2).long()


def test_a_linear_head_is_found_for_linearly_separable_classes() -> None:
    assert find(*lines()).candidates[0].lr is None


def test_with_many_classes_penalties_are_tried_one_by_one_up_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    every = find(*lines()).candidates
    monkeypatch.setattr(search, "_MOST_VALUES", 0)
    some = find(*lines()).candidates
    assert some[0] == every[0]
    assert 3 <= sum(one.penalty is not None and not one.common for one in some) < len(search.PENALTIES)


def test_a_hidden_layer_is_found_for_classes_that_are_not_linearly_separable() -> None:
    features, labels = rings()
    found = find(features, labels)
    assert found.candidates[0].penalty is None
    assert found.candidates[0].accuracy > 0.9
    tested = slice(3 * len(labels) // 4, None)
    head = torch.nn.Sequential(*found.layers)
    with torch.no_grad():
        right = (head(features[tested])[:, 0] > 0).long() == labels[tested]
    assert right.float().mean() > 0.9


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("penalty", [1.0, 100.0])
def test_a_linear_head_equals_scikit_learns_logistic_regression(classes: int, penalty: float) -> None:
    features, labels = lines()
    labels = labels.clamp(max=classes - 1)
    features = (features - features.mean(0)) / features.std(0)
    rows = [torch.arange(0, 600), torch.arange(200, 800)]
    data = Data(features, labels, 1 if classes == 2 else classes)
    (heads,) = train_linear(data, rows, [penalty, penalty], 0.0, 300, 300)
    for own, head in zip(rows, heads, strict=True):
        theirs = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=5000).fit(
            features[own].numpy(), labels[own].numpy()
        )
        with torch.no_grad():
            logits = head(features)
        probabilities = logits.sigmoid()[:, 0] if classes == 2 else logits.softmax(1)
        expected = theirs.predict_proba(features.numpy())
        assert np.abs(probabilities.numpy() - (expected[:, 1] if classes == 2 else expected)).max() < 2e-3


def test_heads_trained_together_equal_heads_trained_alone() -> None:
    features, labels = lines()
    data, rows = Data(features, labels, 3), torch.arange(400)
    limited = phase().model_copy(update={"epochs": 1, "optimizer": "sgd", "lr": 0.1, "clip_norm": 0.05})
    (alone,), *_ = train_hidden(data, [rows], 16, limited, 0)
    (first, *_), *_ = train_hidden(data, [rows, rows + 100, rows + 200], 16, limited, 0)
    with torch.no_grad():
        assert torch.allclose(alone(features), first(features), atol=1e-5)


def test_the_scale_of_the_features_does_not_change_the_head() -> None:
    features, labels = lines()
    scale = 10 ** torch.linspace(-3, 3, features.shape[1])
    plain, scaled = find(features, labels), find(features * scale + 7 * scale, labels)
    losses = [[one.loss for one in found.candidates if not one.common] for found in (plain, scaled)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


@pytest.mark.parametrize("common", [True, False])
def test_features_keep_their_proportions_where_the_most_variable_ones_predict_the_class(common: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 3
    telling = torch.randn(400, 10, generator=generator) + 2 * torch.eye(10)[labels]
    noise = torch.randn(400, 300, generator=generator)
    small = (1.0, 0.05) if common else (0.05, 1.0)
    found = find(torch.cat([small[0] * telling, small[1] * noise], dim=1), labels)
    assert found.candidates[0].common == common
    spread = found.layers[0].spread
    assert (spread.max() / spread.min() < 1.0001) == common
    # On the second scale, only the best penalty of the first one and its neighbours are tried.
    for scale, penalties in ((False, len(search.PENALTIES)), (True, 3)):
        assert sum(one.penalty is not None and one.common == scale for one in found.candidates) == penalties


def test_swapped_labels_of_training_images_are_found_without_training_again() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.randint(0, 3, (600,), generator=generator)
    features = torch.randn(600, 20, generator=generator) + 4 * torch.eye(20)[truth]
    labels = truth.clone()
    swapped = torch.arange(0, 300, 15)
    labels[swapped] = (labels[swapped] + 1) % 3
    found = find(features, labels)
    probabilities = found.logits.double().softmax(1).numpy()
    names = [entry.path for entry in found.entries]
    listed = find_suspects(names, labels[: len(names)].numpy(), probabilities, ["a", "b", "c"])
    first = {one.path for one in listed[: len(swapped)]}
    assert len(first & {f"{number}.png" for number in swapped.tolist()}) >= 0.9 * len(swapped)


def test_folds_are_stratified_and_keep_copies_and_groups_together() -> None:
    labels = torch.tensor([0] * 100 + [1] * 20)
    entries = entries_of(labels)
    entries[:10] = [replace(entry, group="one scene") for entry in entries[:10]]
    entries[20] = replace(entries[20], sha256=entries[30].sha256)
    folds = assign_folds(entries, 0)
    assert len(set(folds[:10].tolist())) == 1
    assert folds[20] == folds[30]
    assert torch.bincount(folds[100:], minlength=FOLDS).tolist() == [4] * FOLDS
    assert not torch.equal(folds, assign_folds(entries, 1))


@pytest.fixture
def searching(project: Project) -> Project:
    project.set("model.head", "pooled")
    project.build()
    return project


def test_the_best_head_is_written_and_fine_tuned(searching: Project) -> None:
    assert searching.run("train_head", "finetune", "evaluate", "plot") == 0
    best, *others = read_table(searching.path("metrics/train_head/candidates.csv"), Candidate, "train_head")
    initial, head = (load_file(searching.checkpoint(name)) for name in ("initial", "head"))
    assert all(torch.equal(tensor, head[key]) for key, tensor in initial.items() if key.startswith("backbone."))
    _, description = load_checkpoint(searching.checkpoint("head"))
    assert description.standardized
    assert description.hidden == (0 if best.lr is None else 8)
    assert description.temperature != 1.0
    _, tuned = load_checkpoint(searching.checkpoint("finetuned"))
    assert replace(tuned, temperature=1.0, recipe={}) == replace(description, temperature=1.0, recipe={})
    with np.load(searching.path("data/out_of_fold.npz")) as content:
        parts = searching.parts()
        assert content["paths"].tolist() == [entry.path for part in ("train", "val") for entry in parts[part]]
        assert content["probabilities"].sum(axis=1) == pytest.approx(1)
    assert f"of {1 + len(others)} heads tried by folds" in searching.path("metrics/report.md").read_text()


def test_the_same_run_gives_the_same_bytes(searching: Project) -> None:
    assert searching.run("train_head") == 0
    first = searching.checkpoint("head").read_bytes()
    searching.checkpoint("head").unlink()
    assert searching.run("train_head") == 0
    assert searching.checkpoint("head").read_bytes() == first


@pytest.mark.parametrize(("key", "value"), [("model.head", "flatten"), ("train_head.search", False)])
def test_without_the_search_the_head_of_the_parameters_is_trained(project: Project, key: str, value: object) -> None:
    project.set("model.head", "pooled")
    project.set(key, value)
    project.build()
    assert project.run("train_head") == 0
    assert read_table(project.path("metrics/train_head/candidates.csv"), Candidate, "train_head") == []
    _, description = load_checkpoint(project.checkpoint("head"))
    assert (description.hidden, description.standardized) == (8, False)


def test_with_augmentation_the_best_head_is_trained_further(
    searching: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    searching.set("train_head.augment", "light")
    assert searching.run("train_head") == 0
    printed = capsys.readouterr().out
    assert "heads tried by 5 folds" in printed
    assert "epoch 2/2" in printed
