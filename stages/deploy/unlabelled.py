"""Unlabelled images: any files and folders, readable or not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stages.common.cli import StageError, stop_if_interrupted
from stages.images.batches import leave_interrupts_to_the_main_process, loaded
from stages.images.collection import Collection, reason, walk
from stages.images.decode import ImageError, decode_with_facts, read_image
from stages.images.preprocessing import Preprocessing

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Loaded:
    """Some images: their paths; why one cannot be read, else `None`; the others, transformed, (n, ...), in order."""

    paths: list[str]
    problems: list[str | None]
    images: Tensor


def find_files(given: list[Path]) -> tuple[list[str], int]:
    """Return files as they are given, and the images at any depth in folders, known by their extension.

    Returns:
        The files, and how many others the folders hold.

    Raises:
        StageError: one is not there, or a folder cannot be listed or holds no images.
    """
    paths: list[str] = []
    others = 0
    for path in given:
        if not path.exists():
            raise StageError(f"{path}: no such file or folder")
        if not path.is_dir():
            paths.append(str(path))
            continue
        found = Collection()
        inside = [str(path / name) for name in walk(path, "", found)]
        if found.rejected:
            folder, problem = next(iter(found.rejected.items()))
            raise StageError(f"{path / folder}: {problem}; make it readable or leave it out")
        if not inside:
            raise StageError(f"{path}: no images in this folder")
        paths += inside
        others += sum(file.is_file() for file in path.rglob("*")) - len(inside)
    return paths, others


class _Unlabelled(Dataset[tuple[Tensor | None, str | None]]):
    """Each image, transformed, or why it cannot be read."""

    def __init__(self, paths: list[str], transform: Transform, preprocessing: Preprocessing) -> None:
        self.paths, self.transform = paths, transform
        self.grey_max, self.least = preprocessing.grey_max, preprocessing.least("none")

    def __getitem__(self, position: int) -> tuple[Tensor | None, str | None]:
        try:
            content = read_image(Path(self.paths[position]))
            return self.transform(decode_with_facts(content, self.grey_max, self.least).image), None
        except FileNotFoundError:
            return None, "no such file"
        except OSError as error:
            return None, reason(error)
        except ImageError as error:
            return None, str(error)

    def __len__(self) -> int:
        return len(self.paths)


def load(
    paths: list[str], transform: Transform, preprocessing: Preprocessing, batch_size: int, workers: int
) -> Iterator[Loaded]:
    """Yield images in batches, in the order of `paths`.

    Args:
        paths: of the files.
        transform: an RGB image -> a tensor, always of the same shape.
        preprocessing: how the images are to be decoded.
        batch_size: images per batch.
        workers: decoding processes; 0: in this one.

    Raises:
        StageError: a process was killed.
    """
    loader: DataLoader[tuple[Tensor | None, str | None]] = DataLoader(
        _Unlabelled(paths, transform, preprocessing),
        batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=leave_interrupts_to_the_main_process,
    )
    first = 0
    for images, problems in loaded(loader):
        stop_if_interrupted()
        yield Loaded(paths[first : first + len(problems)], problems, images)
        first += len(problems)


def _collate(items: list[tuple[Tensor | None, str | None]]) -> tuple[Tensor, list[str | None]]:
    images = [image for image, _ in items if image is not None]
    return torch.stack(images) if images else torch.empty(0), [problem for _, problem in items]
