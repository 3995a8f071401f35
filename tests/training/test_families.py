"""Kept activations and the trained tail, on one small network of every family."""

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from _pytest.mark import ParameterSet
from conftest import FAMILIES, LARGE, STAGES, Project, families, image_size_of, make_images
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common.params import Head
from stages.images.batches import Batches
from stages.images.index import Entry
from stages.images.preprocessing import Preprocessing
from stages.network.backbones import stock_model
from stages.network.checkpoint import load_checkpoint
from stages.network.network import Network, build_network, calibrate_batchnorm, cut, set_trainable
from stages.training.batches import open_batches
from stages.training.features import FrozenPrefix, keep
from stages.training.history import Epoch, History
from stages.training.loop import Trainer

CPU = torch.device("cpu")
HEADS = get_args(Head)


def runs() -> Iterator[ParameterSet]:
    """Every head on every family with two and three classes; in a usual run of the tests one of them each.

    None of them on the largest networks.
    """
    for number, arch in enumerate(FAMILIES.values()):
        for classes in (2, 3):
            for position, head in enumerate(HEADS):
                usual = number % len(HEADS) == position and number % 2 == classes % 2 and arch not in LARGE
                if usual:
                    yield pytest.param(arch, classes, head, [2])
                yield pytest.param(arch, classes, head, [0, None] if usual else [0, 2, None], marks=pytest.mark.slow)


@pytest.fixture
def entries(tmp_path: Path) -> list[Entry]:
    root = make_images(tmp_path / "images", count=2, size=64)
    files = sorted(root.rglob("*.png"))
    return [
        Entry(file.relative_to(root).as_posix(), 0, "cat", hashlib.sha256(file.read_bytes()).hexdigest())
        for file in files
    ]


def trained_like(arch: str) -> Network:
    """A network whose BatchNorm has statistics and affine parameters as trained ones have, neither 0 nor 1."""
    torch.manual_seed(0)
    size = image_size_of(arch)
    network = build_network(stock_model(arch, size), "pooled", 8, outputs=1, image_size=size)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    # Of images that differ much: a small variance would blow up what rounding leaves, above what is tested here.
    calibrate_batchnorm(network, [4 * torch.rand(16, 1, 1, 1) * torch.randn(16, 3, size, size)])
    set_trainable(network, 0)
    return network


def blocks(project: Project) -> int:
    return len(load_checkpoint(project.checkpoint("head"))[0].backbone)


def changed_blocks(project: Project) -> set[int]:
    head, finetuned = (load_checkpoint(project.checkpoint(name))[0].backbone for name in ("head", "finetuned"))
    return {
        number
        for number, (before, after) in enumerate(zip(head, finetuned, strict=True))
        if any(
            not torch.equal(*tensors)
            for tensors in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
        )
    }


def batchnorm_of(project: Project, name: str) -> list[bytes]:
    network, _ = load_checkpoint(project.checkpoint(name))
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    return [tensor.numpy().tobytes() for norm in norms for tensor in norm.state_dict().values()]


@pytest.mark.usefixtures("cold_cache")
@pytest.mark.parametrize("arch", families())
def test_cached_activations_and_the_tail_equal_the_plain_network_at_every_cut(
    arch: str, tmp_path: Path, entries: list[Entry], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    network = trained_like(arch)
    preprocessing = Preprocessing(crop=image_size_of(arch))
    ((images, _),) = Batches(root, entries, preprocessing, len(entries), workers=0)
    with torch.inference_mode():
        plain = network.eval()(images)
        rounding = (copy.deepcopy(network).double()(images.double()) - plain).abs().max()
    # As `train_head` does: what a later cut needs is kept in passing, by a prefix that is longer.
    whole = FrozenPrefix(cut(network, unfreeze=0)[0], root, preprocessing, CPU, "float32", 0)
    keep(whole, dict.fromkeys(range(len(network.backbone) + 1), entries), 1.0)
    assert "activations: 4 images" in capsys.readouterr().out
    for unfreeze in range(len(network.backbone) + 1):
        blocks, tail = cut(network, unfreeze)
        prefix = FrozenPrefix(blocks, root, preprocessing, CPU, "float32", 0)
        kept = keep(prefix, {len(prefix.blocks): entries}, 1.0)[len(prefix.blocks)]
        assert not kept.missing(entries)
        assert capsys.readouterr().out == ""  # nothing is computed again
        ((rows, *_),) = open_batches(prefix, entries, kept, len(entries))
        logits = Trainer(tail, CPU).logits(rows)
        assert (logits - plain).abs().max() <= 1e-5 * plain.abs().max() + 2 * rounding, unfreeze


def small_project(folder: Path, arch: str, classes: int, unfreeze: int | None) -> Project:
    make_images(folder / "images", classes=("cat", "dog", "owl")[:classes], count=6, size=64)
    project = Project(folder)
    project.set("model.arch", arch)
    project.set("model.image_size", image_size_of(arch))
    project.set("finetune.unfreeze", unfreeze)
    return project


@pytest.mark.slow
@pytest.mark.usefixtures("cold_cache")
@pytest.mark.parametrize("stage", ["train_head", "finetune"])
@pytest.mark.parametrize("arch", FAMILIES.values())
def test_a_stopped_stage_resumes_to_the_same_bytes_for_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arch: str, stage: str
) -> None:
    project = small_project(tmp_path, arch, 3, 2)
    project.set("model.head", "original")  # with the dropout of networks that have it
    project.set("finetune.select", "last")
    for phase in ("train_head", "finetune"):
        project.set(f"{phase}.epochs", 2)
    assert project.run(*STAGES[: STAGES.index(stage) + 1]) == 0
    output = project.checkpoint("head" if stage == "train_head" else "finetuned")
    whole = output.read_bytes()
    output.unlink()

    monkeypatch.setattr("stages.training.resume.SECONDS", 0.0)
    real, added = History.add, []

    def stop_in_the_second_epoch(history: History, epoch: Epoch) -> None:
        added.append(epoch)
        if len(added) == 3:
            raise KeyboardInterrupt
        real(history, epoch)

    with monkeypatch.context() as stopping:
        stopping.setattr(History, "add", stop_in_the_second_epoch)
        assert project.run(stage) == 130
    capsys.readouterr()
    assert project.run(stage) == 0
    assert "resuming after epoch 1" in capsys.readouterr().out
    assert output.read_bytes() == whole


@pytest.mark.parametrize(("arch", "classes", "head", "unfreeze"), list(runs()))
def test_every_family_runs_with_every_head_and_any_number_of_blocks(
    tmp_path: Path, arch: str, classes: int, head: str, unfreeze: list[int | None]
) -> None:
    project = small_project(tmp_path, arch, classes, unfreeze[0])
    project.set("model.head", head)
    project.set("train_head.epochs", 1)
    project.set("finetune.epochs", 1)
    assert project.run(*STAGES[:3]) == 0
    for number in unfreeze:
        trained = blocks(project) if number is None else number
        project.set("finetune.unfreeze", trained)
        assert project.run("finetune", "evaluate") == 0
        assert changed_blocks(project) <= set(range(blocks(project) - trained, blocks(project)))
        assert batchnorm_of(project, "finetuned") == batchnorm_of(project, "initial")
