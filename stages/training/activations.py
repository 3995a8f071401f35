"""What the frozen prefix of a network makes of the pictures: computed once and kept, or live.

Activations are kept in the user's cache, by content: a folder's name is a hash of the prefix, the preprocessing and the
precision, and in it a picture's row is found by the SHA-256 of its file. So a stale value cannot be read, and another
rate, seed or split reads what an earlier run wrote.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stages.common.device import autocast, dtype_of
from stages.common.params import Augment, Precision
from stages.common.stage import stop_if_interrupted
from stages.pictures.batches import Batch, Batches, Order
from stages.pictures.index import Entry
from stages.pictures.preprocessing import Preprocessing
from stages.training import cache
from stages.training.fusion import fold_batchnorm
from stages.training.store import Kept, Writer, find

# Part of each folder's name: to be raised when the same prefix and picture give other values than before.
_FORMAT = 2
# One size for all: the last digits of a convolution may depend on the number of pictures in the batch.
_BATCH = 32


class Inputs(Protocol):
    """Batches for the tail of a network: (activations (n, ...), labels (n,)), on its device."""

    def __len__(self) -> int:
        """Return the number of batches."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next pass."""
        ...


@dataclass(frozen=True)
class FrozenPrefix:
    """The blocks that training does not change, and the pictures that go through them.

    `blocks` are on `device`, all of them frozen; `root` is the folder that the entries' paths are relative to.
    """

    blocks: nn.Sequential
    root: Path
    preprocessing: Preprocessing
    device: torch.device
    precision: Precision
    workers: int

    def keep(self, entries: list[Entry], max_gigabytes: float, also_before: int | None = None) -> Kept | None:
        """Find the activations of pictures in the cache; compute those that are not there, once, and keep them.

        Where they cannot be kept, a line says why.

        Args:
            entries: the pictures.
            max_gigabytes: of the whole cache; it has to hold all of them.
            also_before: a number of blocks. What enters the last so many is kept in the same pass, for a later stage
                that trains them.

        Returns:
            The activations, or `None` where they cannot be kept.

        Raises:
            StageError: a picture is gone or changed since the index was made.
        """
        count = len(self.blocks)
        folders = _folders(self)
        kept = find(folders[count], {entry.sha256 for entry in entries})
        missing = kept.missing(entries)
        if not missing:
            return kept
        wanted = {count: folders[count]}
        if also_before is not None and 0 < also_before <= count:
            wanted[count - also_before] = folders[count - also_before]
        try:
            with cache.one_at_a_time(folders[count], "waiting for another process that computes the same activations"):
                kept.add(find(folders[count], missing.keys()))
                missing = kept.missing(entries)
                _compute(self, list(missing.values()), wanted, max_gigabytes)
            kept.add(find(folders[count], missing.keys()))
        except OSError as error:
            print(f"activations are not kept, but computed each time: {cache.explain(error)}", flush=True)
            return None
        return None if kept.missing(entries) else kept

    def batches(
        self,
        entries: list[Entry],
        kept: Kept | None,
        batch_size: int,
        augment: Augment = "none",
        shuffle_seed: int | None = None,
    ) -> Inputs:
        """Return batches of activations: kept ones where there are any, live ones of augmented pictures in any case.

        Args:
            entries: the pictures.
            kept: as `keep` returns it, with all of `entries`.
            batch_size: pictures per batch; the last one may be smaller.
            augment: for training pictures only.
            shuffle_seed: as in `Batches`.
        """
        if kept is not None and augment == "none":
            return _KeptInputs(kept, entries, batch_size, shuffle_seed, self.device)
        pinned = self.device.type == "cuda"
        pictures = Batches(
            self.root, entries, self.preprocessing, batch_size, self.workers, augment, shuffle_seed, pinned
        )
        return _LiveInputs(self, pictures)


class _KeptInputs:
    def __init__(
        self, kept: Kept, entries: list[Entry], batch_size: int, shuffle_seed: int | None, device: torch.device
    ) -> None:
        self.kept, self.entries, self.batch_size, self.device = kept, entries, batch_size, device
        self.labels = torch.tensor([entry.label for entry in entries], device=device)
        self.order = Order(len(entries), shuffle_seed)
        self.resident = kept.gather(entries).to(device) if _fits(kept, entries, device) else None

    def __len__(self) -> int:
        return math.ceil(len(self.entries) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        positions = [position for position, _ in self.order]
        for first in range(0, len(positions), self.batch_size):
            stop_if_interrupted()
            chosen = positions[first : first + self.batch_size]
            if self.resident is not None:
                inputs = self.resident[chosen]
            else:
                inputs = self.kept.gather([self.entries[position] for position in chosen])
                if self.device.type == "cuda":
                    inputs = inputs.pin_memory()
                inputs = inputs.to(self.device, non_blocking=True)
            yield inputs, self.labels[chosen]

    def set_epoch(self, epoch: int) -> None:
        self.order.epoch = epoch


def _fits(kept: Kept, entries: list[Entry], device: torch.device) -> bool:
    """Whether all activations can stay on a GPU: in half of what is free, the rest is for training."""
    if device.type != "cuda" or not entries:
        return False
    return kept.nbytes(entries) < torch.cuda.mem_get_info(device)[0] // 2


class _LiveInputs:
    def __init__(self, prefix: FrozenPrefix, pictures: Batches) -> None:
        self.pictures, self.device = pictures, prefix.device
        self.forward, self.blocks = _make_forward(prefix), len(prefix.blocks)

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.pictures:
            (activations,) = self.forward(images, [self.blocks])
            yield activations, labels.to(self.device, non_blocking=True)

    def set_epoch(self, epoch: int) -> None:
        self.pictures.set_epoch(epoch)


def _make_forward(prefix: FrozenPrefix) -> Callable[[Tensor, Collection[int]], list[Tensor]]:
    """Return images, numbers of blocks -> what the prefix makes of them after so many blocks, contiguous."""
    blocks = fold_batchnorm(prefix.blocks).eval().to(memory_format=torch.channels_last)

    # Not inference_mode: its tensors cannot enter what autograd looks at.
    @torch.no_grad()
    def forward(images: Tensor, cuts: Collection[int]) -> list[Tensor]:
        activations = images.to(prefix.device, memory_format=torch.channels_last, non_blocking=True)
        after = {0: activations}
        with autocast(prefix.device, prefix.precision):
            for number, block in enumerate(blocks, start=1):
                activations = block(activations)
                if number in cuts:
                    after[number] = activations
        return [after[cut].to(dtype_of(prefix.precision)).contiguous() for cut in cuts]

    return forward


def _folders(prefix: FrozenPrefix) -> list[Path]:
    """Return where the activations after 0, 1, 2 ... blocks of the prefix are kept."""
    about = {
        "format": _FORMAT,
        "preprocessing": prefix.preprocessing.to_json(),
        "precision": prefix.precision,
        # The same computation elsewhere differs in its last digits.
        "device": prefix.device.type,
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    names = [digest.hexdigest()]
    for block in prefix.blocks:
        digest.update(repr(block).encode())
        for key, tensor in block.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        names.append(digest.hexdigest())
    return [cache.cache_folder() / "activations" / name[:40] for name in names]


def _compute(prefix: FrozenPrefix, needed: list[Entry], folders: dict[int, Path], max_gigabytes: float) -> None:
    """Compute what the first of `folders`, by number of blocks, lacks, and keep it there.

    Of the same pictures, what the other folders lack is kept too, if there is room: it can be left to a later stage.

    Raises:
        OSError: it cannot be written.
    """
    if not needed:
        return
    crop = prefix.preprocessing.crop
    forward = _make_forward(prefix)
    sizes = [tensor.nbytes for tensor in forward(torch.zeros(1, 3, crop, crop), folders)]
    hashes = {entry.sha256 for entry in needed}
    _, *others = folders.values()
    missing = [hashes, *(find(folder, hashes).missing(needed).keys() for folder in others)]
    if others:
        try:
            cache.make_room(sum(len(absent) * size for absent, size in zip(missing, sizes, strict=True)), max_gigabytes)
        except cache.FullError:
            missing = [hashes]
    cache.make_room(len(needed) * sizes[0], max_gigabytes)
    cuts = list(folders)[: len(missing)]
    writers = [Writer(folders[cut], absent) for cut, absent in zip(cuts, missing, strict=True)]
    started = time.monotonic()
    batches = Batches(prefix.root, needed, prefix.preprocessing, _BATCH, prefix.workers)
    with tqdm(total=len(needed), desc="activations", unit=" pictures", disable=None) as progress:
        position = 0
        for images, _ in batches:
            count = len(images)
            padded = torch.cat([images, images.new_zeros(_BATCH - count, *images.shape[1:])])
            batch = [entry.sha256 for entry in needed[position : position + count]]
            for writer, activations in zip(writers, forward(padded, cuts), strict=True):
                writer.add(batch, activations[:count].cpu())
            position += count
            progress.update(count)
    for writer in writers:
        writer.flush()
    if not sys.stderr.isatty():
        seconds = time.monotonic() - started
        print(f"activations: {len(needed):,} pictures, {len(needed) / seconds:.0f} pictures/s", flush=True)
