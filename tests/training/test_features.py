"""Kept activations: never stale, never in the way, and the same as live ones."""

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from resource import RLIMIT_NOFILE, setrlimit
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import STAGES, Project, make_images, run_forked
from PIL import Image
from safetensors.torch import save_file

from stages.common.cli import run
from stages.images.index import Entry, read_index, write_index
from stages.training import cache, features
from stages.training.history import read_history

pytestmark = pytest.mark.usefixtures("cold_cache")


@pytest.fixture
def built(project: Project) -> Project:
    project.build()
    return project


def kept_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def computed(capsys: pytest.CaptureFixture[str]) -> int:
    """How many images' activations were computed since the last call, as the stages say."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("activations: ")]
    return sum(int(line.split()[1]) for line in lines)


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr("stages.images.batches.read_image", refuse)


def test_each_image_is_computed_once_for_all_stages_and_experiments(
    built: Project, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    assert built.run(*STAGES[2:5]) == 0
    # Those to train on and to watch by train_head, also for finetune; those of the test by evaluate.
    assert computed(capsys) == 40
    request.getfixturevalue("no_decoding")
    for key, value in {"train_head.lr": 0.002, "finetune.lr": 2e-5, "train_head.epochs": 3}.items():
        built.set(key, value)
    assert built.run(*STAGES[2:5]) == 0
    assert computed(capsys) == 0


def test_another_seed_and_another_split_compute_nothing_again_and_new_images_are_computed_alone(
    built: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    built.set("model.weights", "weights.safetensors")
    built.set("finetune.unfreeze", 13)  # nothing of the backbone is shared by the fine-tuned network
    assert built.run("split") == 0
    from stages.network.backbones import stock_model

    save_file(stock_model("mobilenet_v3_small").state_dict(), built.path("weights.safetensors"))
    assert built.run("build_model", "train_head") == 0
    trained_on = computed(capsys)
    built.set("seed", 7)
    built.set("split.val_size", 0)  # every image is trained on or watched
    assert built.run("split", "build_model", "train_head") == 0
    assert computed(capsys) == 40 - trained_on
    make_images(built.path("images/more"), count=3, size=48)
    for name in ("cat", "dog"):
        for image in (built.path("images/more") / name).iterdir():
            image.rename(built.path("images") / name / f"new {image.name}")
    shutil.rmtree(built.path("images/more"))
    assert built.run("split", "build_model", "train_head") == 0
    assert computed(capsys) == 6


def test_a_change_that_affects_activations_never_gets_old_ones(
    built: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def count_computed() -> int:
        capsys.readouterr()
        assert built.run("train_head") == 0
        return computed(capsys)

    every = count_computed()
    assert (every, count_computed()) == (32, 0)
    index = built.path("data/index/train.csv")
    first, *others = read_index(index)
    path = built.path("images") / first.path
    Image.new("RGB", (40, 40), "red").save(path)
    write_index(index, [replace(first, sha256=hashlib.sha256(path.read_bytes()).hexdigest()), *others])
    assert count_computed() == 1
    built.set("seed", 1)  # other random weights, on the same split
    assert built.run("build_model") == 0
    assert count_computed() == every
    built.set("model.image_size", 33)
    assert built.run("build_model") == 0
    assert count_computed() == every
    built.set("precision", "bfloat16")
    assert count_computed() == every
    monkeypatch.setattr(features, "version", lambda name: f"another {name}")
    assert count_computed() == every
    monkeypatch.setattr(features, "hash_code", lambda *_: "edited")
    assert count_computed() == every


def test_kept_activations_train_as_live_ones_do(built: Project, capsys: pytest.CaptureFixture[str]) -> None:
    built.set("finetune.lr", 1e-3)

    def losses() -> list[list[float | None]]:
        shutil.rmtree(cache.cache_folder(), ignore_errors=True)
        assert built.run("train_head", "finetune") == 0
        return [
            [
                loss
                for epoch in read_history(built.path(f"metrics/{stage}"))
                for loss in (epoch.train_loss, epoch.val_loss)
            ]
            for stage in ("train_head", "finetune")
        ]

    kept = losses()
    assert computed(capsys) > 0
    built.set("cache.max_gigabytes", 0.0)
    live = losses()
    assert "images are not stored, but computed at each use: " in capsys.readouterr().out
    assert live == kept
    assert all(of_stage[0] != of_stage[2] for of_stage in live)


def test_with_augmentation_no_training_image_is_cached(
    built: Project, capsys: pytest.CaptureFixture[str], cold_cache: Path
) -> None:
    for phase in ("train_head", "finetune"):
        built.set(f"{phase}.augment", "light")
    assert built.run("train_head") == 0
    assert computed(capsys) == len(read_index(built.path("data/index/val.csv")))
    named = "".join(str(path.read_bytes()) for path in kept_files(cold_cache))
    assert all(entry.sha256 not in named for entry in read_index(built.path("data/index/train.csv")))
    assert all(entry.sha256 in named for entry in read_index(built.path("data/index/val.csv")))


def test_with_augmentation_kept_activations_of_the_same_images_are_not_used(
    built: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert built.run("train_head") == 0
    plain = read_history(built.path("metrics/train_head"))
    built.set("train_head.augment", "strong")
    assert built.run("train_head") == 0
    augmented = read_history(built.path("metrics/train_head"))
    assert all(one.train_loss != other.train_loss for one, other in zip(plain[1:], augmented[1:], strict=True))


@pytest.mark.parametrize("damage", ["a byte", "the end", "all"])
def test_a_damaged_file_is_noticed_and_computed_again(
    built: Project, capsys: pytest.CaptureFixture[str], cold_cache: Path, damage: str
) -> None:
    assert built.run("train_head") == 0
    checkpoint, first = built.checkpoint("head").read_bytes(), computed(capsys)
    for path in kept_files(cold_cache):
        content = bytearray(path.read_bytes())
        if damage == "a byte":
            content[-100] ^= 1
        path.write_bytes({"a byte": content, "the end": content[:-100], "all": b""}[damage])
    assert built.run("train_head") == 0
    out = capsys.readouterr().out
    assert "damaged (" in out
    assert f"activations: {first} images" in out
    assert built.checkpoint("head").read_bytes() == checkpoint


def test_two_processes_compute_the_same_activations_once(project: Project, cold_cache: Path) -> None:
    make_images(project.path("images"), count=60)
    project.set("train_head.epochs", 1)
    project.build()
    other = copy(project)
    other.folder = project.folder.parent / f"{project.folder.name} other"
    shutil.copytree(project.folder, other.folder, ignore=shutil.ignore_patterns("cache"))
    assert run_forked(said := project.path("said"), *(partial(one.run, "train_head") for one in (project, other))) == 0
    assert said.read_text().count("images/s") == 1
    assert other.checkpoint("head").read_bytes() == project.checkpoint("head").read_bytes()


@pytest.mark.parametrize("problem", [pytest.param("not a folder", marks=pytest.mark.slow), "read-only"])
def test_a_cache_that_cannot_be_written_is_reported_and_training_continues(
    built: Project,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cold_cache: Path,
    problem: str,
) -> None:
    if problem == "not a folder":
        cold_cache.write_text("")
    else:
        cold_cache.mkdir()

        def refuse(path: Path, content: bytes) -> None:
            raise OSError(30, "Read-only file system", str(path))

        monkeypatch.setattr(features, "write_bytes", refuse)
    assert built.run("train_head", "finetune", "evaluate") == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "images are not stored" in line]
    # Each at its own depth: those of the head, of fine-tuning in passing and for itself, of the test images.
    assert len(lines) >= 4
    assert all(str(cold_cache) in line for line in lines)


def test_train_head_caches_nothing_that_fine_tuning_cannot_use(built: Project, cold_cache: Path) -> None:
    built.set("finetune.augment", "light")
    assert built.run("train_head") == 0
    watched = {entry.sha256 for entry in read_index(built.path("data/index/val.csv"))}
    images = {entry.sha256 for entry in read_index(built.path("data/index/train.csv"))} | watched
    folders = [folder for folder in (cold_cache / "activations").iterdir() if folder.is_dir()]
    named = [{sha256 for sha256 in images if sha256 in contents(folder)} for folder in folders]
    assert sorted(named, key=len) == [watched, images]  # for fine-tuning, for the head


def contents(folder: Path) -> str:
    return "".join(str(path.read_bytes()) for path in kept_files(folder))


def test_many_cache_files_need_few_file_descriptors(built: Project) -> None:
    def work() -> int:
        setrlimit(RLIMIT_NOFILE, (60, 60))
        features._FILE_BYTES = features.BATCH = 1
        return built.run("train_head")

    assert run_forked(said := built.path("said"), work) == 0, said.read_text()
    assert "not stored" not in said.read_text()
    assert len(kept_files(cache.activations_folder())) > 60


def write(path: Path, age: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"0" * 1000)
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def make_room(needed: int, limit: int, **options: Any) -> None:
    cache.make_room(needed, limit / 1e9, **options)


def test_without_room_for_all_activations_none_are_cached_and_the_result_is_the_same(
    built: Project, capsys: pytest.CaptureFixture[str], cold_cache: Path
) -> None:
    built.set("finetune.lr", 1e-3)
    assert built.run("train_head", "finetune") == 0
    checkpoints = [built.checkpoint(name).read_bytes() for name in ("head", "finetuned")]
    total = sum(path.stat().st_size for path in kept_files(cold_cache))
    shutil.rmtree(cold_cache)
    capsys.readouterr()
    built.set("cache.max_gigabytes", total / 2 / 1e9)
    assert built.run("train_head", "finetune") == 0
    line = (
        r"activations of 32 images are not stored, but computed at each use: .*no room for .* under cache.max_gigabytes"
    )
    assert re.search(line, capsys.readouterr().out)
    assert 0 < sum(path.stat().st_size for path in kept_files(cold_cache)) <= total / 2
    assert [built.checkpoint(name).read_bytes() for name in ("head", "finetuned")] == checkpoints


def test_rows_removed_by_another_process_are_computed_again_and_open_ones_stay_readable(
    built: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cold_cache: Path
) -> None:
    assert built.run("train_head") == 0
    checkpoint = built.checkpoint("head").read_bytes()
    real = features.find

    def find_and_lose(folder: Path, entries: list[Entry]) -> features.Kept:
        found = real(folder, entries)
        for path in kept_files(folder):
            path.unlink()
        return found

    monkeypatch.setattr(features, "find", find_and_lose)
    assert built.run("train_head") == 0
    assert "not stored" not in capsys.readouterr().out
    assert built.checkpoint("head").read_bytes() == checkpoint
    monkeypatch.setattr(features, "find", lambda folder, entries: real(folder, []))
    assert built.run("train_head") == 0
    assert "images are not stored, but computed at each use: another process removed them" in capsys.readouterr().out
    assert built.checkpoint("head").read_bytes() == checkpoint


def test_the_least_recently_used_files_make_room_and_what_cannot_fit_removes_nothing(cold_cache: Path) -> None:
    used, oldest, newer = (
        write(cold_cache / part / "rows", age) for part, age in (("activations/a", 300), ("states", 200), ("b", 100))
    )
    with pytest.raises(OSError, match=r"under cache\.max_gigabytes"):
        make_room(2600, 3500, spare=[used])
    assert all(path.exists() for path in (used, oldest, newer))
    make_room(1000, 3500, spare=[used])
    assert [path.exists() for path in (used, oldest, newer)] == [True, False, True]
    make_room(3000, 3500)
    assert not used.exists()


def test_on_a_full_disk_old_files_of_the_cache_make_room(cold_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (write(cold_cache / "activations" / name / "rows", age) for name, age in (("a", 200), ("b", 100)))

    def usage(_: Path) -> Any:
        return SimpleNamespace(free=500 + 1000 * sum(not path.exists() for path in (old, new)))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(OSError, match="on the disk"):
        make_room(3000, 10**9)
    assert all(path.exists() for path in (old, new))
    make_room(1400, 10**9)
    assert (old.exists(), new.exists()) == (False, True)


def test_using_a_file_makes_it_the_last_to_be_removed(built: Project, cold_cache: Path) -> None:
    assert built.run("train_head") == 0
    files = kept_files(cold_cache)
    for path in files:
        os.utime(path, (0, 0))
    assert built.run("finetune") == 0
    assert 0 < sum(path.stat().st_mtime > 0 for path in files) < len(files)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["cache", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            run(cache.main)
        assert not exit_info.value.code
        return capsys.readouterr().out

    return call


def test_a_cached_row_is_checksummed_once_per_run(
    built: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built.set("finetune.unfreeze", 0)  # nothing else is kept in passing
    assert built.run("train_head") == 0
    kept = computed(capsys)
    real, checked = features._checksum, 0

    def count(row: torch.Tensor) -> int:
        nonlocal checked
        checked += 1
        return real(row)

    monkeypatch.setattr(features, "_checksum", count)
    index = built.path("data/index/test.csv")
    write_index(
        built.path("data/index/train.csv"), [*read_index(built.path("data/index/train.csv")), *read_index(index)]
    )
    assert built.run("train_head") == 0
    new = computed(capsys)
    assert new == len(read_index(index))
    # A new row: when it is written, and when it is read back.
    assert checked == kept + 2 * new


def test_the_cache_command_prints_the_size_and_clears(cold_cache: Path, tool: object) -> None:
    assert tool() == f"{cold_cache}: 0 files, 0.00 GB\n"  # type: ignore[operator]
    kept = [write(cold_cache / name / "rows", 1) for name in ("a", "b")]
    assert tool() == f"{cold_cache}: 2 files, 0.00 GB\n"  # type: ignore[operator]
    assert tool("--clear").endswith(f"{cold_cache}: 0 files, 0.00 GB\n")  # type: ignore[operator]
    assert not any(path.exists() for path in kept)
