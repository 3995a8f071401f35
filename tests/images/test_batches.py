"""Batches of images: what they depend on, and how their processes fail."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_images

from stages.common.cli import StageError
from stages.images.batches import Batches, Order
from stages.images.index import Entry
from stages.images.preprocessing import Preprocessing


@pytest.fixture
def entries(tmp_path: Path) -> list[Entry]:
    root = make_images(tmp_path / "images", count=5)
    return [
        Entry(path.relative_to(root).as_posix(), 0, "cat", hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(root.rglob("*.png"))
    ]


def test_augmentation_uses_only_its_own_generator(
    tmp_path: Path, entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeds_the_gpu_too(_: int) -> None:
        raise AssertionError("dropout on a GPU would depend on the number of workers")

    monkeypatch.setattr(torch, "manual_seed", seeds_the_gpu_too)
    state = torch.get_rng_state()
    order = Order(len(entries), seed=1)
    batches = Batches(tmp_path / "images", entries, Preprocessing(crop=32), 4, 0, "strong", order)
    first, second = ([images for images, _ in batches] for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory.",
            "/dev/shm",
        ),
        ("unable to write to file </torch_7_1_0>: No space left on device (28)", "/dev/shm"),
        ("unable to allocate shared memory(shm) for file </torch_7_1_0>: Success (0)", "/dev/shm"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "out of memory"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "out of memory"),
    ],
)
def test_full_shared_memory_and_killed_workers_are_told_apart(
    tmp_path: Path, entries: list[Entry], monkeypatch: pytest.MonkeyPatch, message: str, advice: str
) -> None:
    batches = Batches(tmp_path / "images", entries, Preprocessing(crop=32), 4, 0)

    def fail(_: object) -> Iterator[object]:
        raise RuntimeError(message)

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", fail)
    with pytest.raises(StageError, match=advice) as error:
        list(batches)
    assert str(error.value).startswith("workers: ")


@pytest.mark.parametrize(("batch_size", "workers", "at_a_time"), [(2, 0, 2), (4, 0, 4), (2, 1, 6), (1, 1, 3)])
def test_images_that_do_not_fit_into_memory_are_refused_before_the_process_is_killed(
    tmp_path: Path, entries: list[Entry], monkeypatch: pytest.MonkeyPatch, batch_size: int, workers: int, at_a_time: int
) -> None:
    needed = at_a_time * 3 * 32 * 32 * 4
    monkeypatch.setattr("stages.common.machine.total_memory", lambda: needed)
    Batches(tmp_path / "images", entries, Preprocessing(crop=32), batch_size, workers)
    monkeypatch.setattr("stages.common.machine.total_memory", lambda: needed - 1)
    with pytest.raises(StageError, match=rf"model.image_size: {at_a_time} images of 32 px"):
        Batches(tmp_path / "images", entries, Preprocessing(crop=32), batch_size, workers)
