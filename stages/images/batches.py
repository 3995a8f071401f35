"""Images of an index -> batches of tensors."""

import hashlib
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from stages.common.cli import StageError, stop_if_interrupted
from stages.common.device import generator_for
from stages.common.machine import require_memory
from stages.common.params import Augment
from stages.common.ranks import Share
from stages.images.decode import ImageError, decode, read_image
from stages.images.index import Entry
from stages.images.preprocessing import Preprocessing, make_transform

Batch = tuple[Tensor, Tensor]

# Batches that a decoding process prepares ahead (torch's default).
_AHEAD = 2
# torch's messages when a file in /dev/shm cannot be created or is too large.
_SHARED_MEMORY_SIGNS = ("Bus error", "shared memory", "(shm)", "/torch_")


def read_entry(root: Path, entry: Entry, grey_max: int | None = None, least: int | None = None) -> Image.Image:
    """Read an image of the index; raise StageError if it changed since `split`. `grey_max`, `least`: as in `decode`."""
    try:
        content = read_image(root / entry.path)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise ImageError("changed")
        return decode(content, grey_max, least)
    except FileNotFoundError:
        problem = "gone"
    except (OSError, ImageError) as error:
        problem = str(error)
    raise StageError(
        f"{root / entry.path}: {problem} since the split was made; bring it back, or run `dvc repro` to split again"
    )


class _Images(Dataset[tuple[Tensor, int] | StageError]):
    """The images of an index, preprocessed: (tensor of shape (3, crop, crop), label).

    The key of an item is (position in the index, seed): an augmented image depends on these alone, not on the process
    that decodes it. Errors are returned, since one raised in a loader's process arrives wrapped in its traceback.
    """

    def __init__(self, root: Path, entries: list[Entry], preprocessing: Preprocessing, augment: Augment) -> None:
        self.root, self.entries, self.augment = root, entries, augment
        self.transform, self.grey_max = make_transform(preprocessing, augment), preprocessing.grey_max
        self.least = preprocessing.least(augment)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int] | StageError:
        position, seed = item
        entry = self.entries[position]
        try:
            image = read_entry(self.root, entry, self.grey_max, self.least)
        except StageError as error:
            return error
        if self.augment == "none":
            return self.transform(image), entry.label
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which without workers would also seed the GPU's generator, used by dropout.
            torch.default_generator.manual_seed(seed)
            return self.transform(image), entry.label


class Order(Sampler[tuple[int, int]]):
    """The positions of a rank, in order or, by `seed`, shuffled differently in each `epoch`; each with its own seed."""

    def __init__(self, count: int, seed: int | None = None, share: Share = Share()) -> None:  # noqa: B008 (frozen)
        self.count, self.seed, self.share, self.epoch = count, seed, share, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (position, seed)."""
        positions, seeds = list(range(self.count)), [0] * self.count
        if self.seed is not None:
            generator = generator_for(self.seed, self.epoch)
            positions = torch.randperm(self.count, generator=generator).tolist()
            seeds = torch.randint(2**62, (self.count,), generator=generator).tolist()
        yield from self.share.of(list(zip(positions, seeds, strict=True)))

    def __len__(self) -> int:
        """Return the number of positions of this share."""
        return len(range(self.share.rank, self.count, self.share.count))


class _Groups(Sampler[list[tuple[int, int]]]):
    """The items of `order` in groups: this rank's part of each batch, which may be empty."""

    def __init__(self, order: Order, batch_size: int) -> None:
        self.order, self.sizes = order, [*map(len, order.share.places(order.count, batch_size))]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        items = iter(self.order)
        for size in self.sizes:
            yield list(islice(items, size))

    def __len__(self) -> int:
        return len(self.sizes)


class Batches:
    """Batches of (images: float32, (n, 3, crop, crop); labels: int64, (n,)).

    A rank has its part of each `batch_size` images, perhaps none. Paths are below `root`. The number of decoding
    processes, `workers` (0: this process), changes no batch. `augment`: for training only; `order`: in place of the
    index's; `pinned`: memory that is copied to a GPU faster. Raises StageError if the images in memory at once do not
    fit.
    """

    def __init__(
        self,
        root: Path,
        entries: list[Entry],
        preprocessing: Preprocessing,
        batch_size: int,
        workers: int,
        augment: Augment = "none",
        order: Order | None = None,
        pinned: bool = False,
    ) -> None:
        self._order = order or Order(len(entries))
        at_a_time = min(len(self._order), batch_size * (1 + _AHEAD * workers))
        require_memory(at_a_time, 3 * preprocessing.crop**2 * 4, preprocessing.crop)
        self._loader: DataLoader[tuple[Tensor, int] | StageError] = DataLoader(
            _Images(root, entries, preprocessing, augment),
            batch_sampler=_Groups(self._order, batch_size),
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=leave_interrupts_to_the_main_process,
            persistent_workers=workers > 0,
            pin_memory=pinned,
            generator=torch.Generator(),  # otherwise each pass draws a number from dropout's generator
        )

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next pass."""
        self._order.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches; raises StageError if an image is gone or changed, or a decoding process was killed."""
        for batch in loaded(self._loader):
            stop_if_interrupted()
            if isinstance(batch, StageError):
                raise batch
            images, labels = batch
            yield images, labels


def loaded(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield a loader's items; raises StageError if a decoding process was killed or cannot return its images."""
    try:
        yield from loader
    except RuntimeError as error:
        message = str(error)
        if any(sign in message for sign in _SHARED_MEMORY_SIGNS):
            raise StageError(
                "workers: /dev/shm, through which processes hand over images, is too small; enlarge it (docker: "
                "--shm-size=1g) or set workers to 0"
            ) from error
        if "DataLoader worker" not in message:
            raise
        raise StageError("workers: a process was killed, probably out of memory; use fewer") from error


def _collate(items: list[tuple[Tensor, int] | StageError]) -> list[Tensor] | StageError:
    if errors := [item for item in items if isinstance(item, StageError)]:
        return errors[0]
    return default_collate(items) if items else [torch.empty(0), torch.empty(0, dtype=torch.int64)]


def leave_interrupts_to_the_main_process(_: int) -> None:
    """Ignore Ctrl-C in a loader's process: the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _ignore_a_gone_process


def _ignore_a_gone_process(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print no traceback if the thread that returns images finds the main process gone."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
