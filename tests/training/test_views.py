"""Augmented versions that are kept, and mixup: all are used, none is stale, and a stopped run goes on with the same."""

import re
from pathlib import Path

import pytest
import torch
from conftest import Project, make_pictures
from test_activations import computed, kept_files, no_decoding
from test_resume import PLACES, outputs, run_killed
from torch import nn

from stages.common.params import Phase
from stages.network import objective
from stages.network.checkpoint import load_checkpoint
from stages.network.network import Network
from stages.pictures.batches import read_entry
from stages.pictures.index import read_index, write_index
from stages.pictures.preprocessing import make_transform
from stages.training.activations import keep, keep_views
from stages.training.history import read_history
from stages.training.inputs import Part, choose_views
from stages.training.prefix import FrozenPrefix, View
from stages.training.trainer import Trainer, mix

__all__ = ["no_decoding"]

pytestmark = pytest.mark.usefixtures("cold_cache")

PICTURES = 28  # of the training part


@pytest.fixture
def built(project: Project) -> Project:
    for phase in ("train_head", "finetune"):
        project.set(f"{phase}.augment", "light")
        project.set(f"{phase}.augment_views", 3)
        project.set(f"{phase}.epochs", 4)
    project.build()
    return project


def test_in_as_many_epochs_as_there_are_versions_each_is_taken_once() -> None:
    epochs = [choose_views(200, 4, 42, epoch) for epoch in range(1, 13)]
    for first in (0, 4, 8):
        assert all(sorted(chosen) == [0, 1, 2, 3] for chosen in zip(*epochs[first : first + 4], strict=True))
    # Every order occurs, another one each time round, and another with another seed.
    assert len(set(zip(*epochs[:4], strict=True))) == 24
    assert epochs[0] != epochs[4]
    assert epochs[0] != choose_views(200, 4, 43, 1)
    assert choose_views(200, 1, 42, 7) == [0] * 200


def test_each_version_is_computed_once_for_both_phases_and_experiments(
    built: Project, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    capsys.readouterr()
    assert built.run("train_head", "finetune") == 0
    watched = len(read_index(built.path("data/index/val.csv")))
    assert computed(capsys) == 3 * PICTURES + watched
    assert built.run("evaluate") == 0
    tested = len(read_index(built.path("data/index/test.csv")))
    assert computed(capsys) == tested
    request.getfixturevalue("no_decoding")
    before = built.checkpoint("head").read_bytes()
    assert built.run("train_head", "finetune") == 0
    assert built.checkpoint("head").read_bytes() == before
    built.set("finetune.lr", 1e-3)
    assert built.run("finetune") == 0


def test_a_kept_version_is_what_the_augmented_picture_is_live(built: Project) -> None:
    network, description = load_checkpoint(built.checkpoint("initial"))
    root, preprocessing = built.path("pictures"), description.preprocessing
    blocks = network.backbone[:2].requires_grad_(False)
    prefix = FrozenPrefix(blocks, root, preprocessing, torch.device("cpu"), "float32", 0)
    entries = read_index(built.path("data/index/train.csv"))
    *views, plain = keep_views(prefix, entries, 3, "strong", 7, 1.0)
    for entry in entries:
        assert torch.equal(plain.row(entry), keep(prefix, entries, 1.0).row(entry))
    (single,) = keep_views(prefix, entries, 1, "strong", 7, 1.0)
    assert torch.equal(single.row(entries[0]), views[0].row(entries[0]))
    different = 0
    for number, kept in enumerate(views):
        view, transform = View("strong", 7, number), make_transform(preprocessing, "strong")
        for entry in entries[:5]:
            with torch.random.fork_rng():
                torch.manual_seed(view.seed_of(entry))
                picture = transform(read_entry(root, entry))
            with torch.no_grad():
                live = blocks.eval()(picture[None])[0]
            assert torch.allclose(kept.row(entry), live, atol=1e-5)
            different += not torch.allclose(kept.row(entry), views[number - 1].row(entry), atol=1e-3)
    assert different == 10


@pytest.mark.parametrize("change", [pytest.param("seed", marks=pytest.mark.slow), "augmentation", "order of the index"])
def test_a_version_hangs_on_its_picture_augmentation_and_seed_alone(
    built: Project, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    assert built.run("train_head") == 0
    capsys.readouterr()
    if change == "seed":
        built.set("seed", 1)
    elif change == "augmentation":
        built.set("train_head.augment", "strong")
    else:
        path = built.path("data/index/train.csv")
        write_index(path, list(reversed(read_index(path))))
    assert built.run("train_head") == 0
    assert computed(capsys) == (0 if change == "order of the index" else 2 * PICTURES)


def test_where_not_all_versions_fit_there_are_fewer_and_a_line_says_so(
    built: Project, capsys: pytest.CaptureFixture[str], cold_cache: Path
) -> None:
    built.set("finetune.augment_views", 0)
    built.set("finetune.unfreeze", 0)  # no smaller activations that would fit
    assert built.run("train_head") == 0
    folders = {path.parent for path in kept_files(cold_cache)}
    sizes = [sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) for folder in folders]
    (view,) = (size for size in set(sizes) if sizes.count(size) == 2)
    # Beside them, the pictures to watch are in use: a seventh of those to train on.
    built.set("cache.max_gigabytes", (2.5 + 1 / 7) * view / 1e9)
    built.set("seed", 5)  # other versions
    for path in kept_files(cold_cache):
        path.unlink()
    assert built.run("train_head") == 0
    printed = capsys.readouterr().out
    assert re.search("2 of 3 versions of each picture are kept: .*no room for .* cache.max_gigabytes", printed)
    built.set("cache.max_gigabytes", 0)
    built.set("seed", 6)
    assert built.run("train_head") == 0
    assert "0 of 3 versions of each picture are kept" in capsys.readouterr().out
    assert len(read_history(built.path("metrics/train_head"))) == 5


def test_a_killed_run_goes_on_with_the_same_versions_and_mixtures(
    built: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    built.set("train_head.mixup", 0.4)
    assert built.run("train_head") == 0
    whole = outputs(built, "train_head")
    run_killed(built, "train_head", *PLACES["between two epochs"][:3])
    capsys.readouterr()
    assert built.run("train_head") == 0
    assert "going on after epoch 2 of a run that was stopped" in capsys.readouterr().out
    assert outputs(built, "train_head") == whole


def test_mixup_mixes_inputs_and_labels_in_the_same_shares() -> None:
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
        make_pictures(project.path("pictures"), ("cat", "dog", "horse"))
    project.build()
    assert project.run("train_head") == 0
    plain = read_history(project.path("metrics/train_head"))
    project.set("train_head.mixup", 1.0)
    assert project.run("train_head") == 0
    mixed = read_history(project.path("metrics/train_head"))
    assert mixed[0].val_loss == plain[0].val_loss
    assert all(one.train_loss != other.train_loss for one, other in zip(plain[1:], mixed[1:], strict=True))


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_step_with_mixup_learns_from_both_labels_in_these_shares(outputs: int) -> None:
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
