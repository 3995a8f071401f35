"""Batches for the tail of a network: cached activations, or ones that the frozen prefix computes on the fly."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from stages.common import ranks
from stages.common.cli import stop_if_interrupted
from stages.common.params import Augment
from stages.common.ranks import Share
from stages.images.batches import Order
from stages.images.index import Entry
from stages.training.features import FrozenPrefix, Kept

# Rows read into memory, or copied to a GPU, at a time.
READ_AT_ONCE = 1024


class Part(NamedTuple):
    """This rank's part of a batch for the tail of a network, on its device.

    `inputs`: activations, (n, ...); `labels`: (n,); `places`: n positions in the batch; `whole`: size of the batch over
    all ranks. If n is 0, `inputs` is a placeholder row, or empty.
    """

    inputs: Tensor
    labels: Tensor
    places: range
    whole: int


class Batches(ABC):
    """Batches for the tail of a network, iterated over once per epoch: this rank's part of each."""

    def __init__(self, prefix: FrozenPrefix, entries: list[Entry], batch_size: int, shuffle_seed: int | None) -> None:
        self.order = Order(len(entries), shuffle_seed, share=prefix.share)
        # This rank's positions in each batch, and the size of the batch.
        own, whole = (share.places(len(entries), batch_size) for share in (prefix.share, Share()))
        self.parts = [(places, len(every)) for places, every in zip(own, whole, strict=True)]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.parts)

    @abstractmethod
    def __iter__(self) -> Iterator[Part]:
        """Yield this rank's part of each batch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next pass."""
        self.order.epoch = epoch


def open_batches(
    prefix: FrozenPrefix,
    entries: list[Entry],
    kept: Kept,
    batch_size: int,
    augment: Augment = "none",
    shuffle_seed: int | None = None,
) -> Batches:
    """Return batches of activations, computed on the fly for augmented images or if any row is missing in `kept`.

    Without augmentation, the bytes are the same either way. `shuffle_seed`: seed of the order, which changes every
    epoch; `None`: the order of the index.
    """
    if augment == "none" and not kept.missing(entries):
        return _Rows(prefix, entries, kept, batch_size, shuffle_seed)
    return _Live(prefix, entries, batch_size, augment, shuffle_seed)


def read_all(prefix: FrozenPrefix, entries: list[Entry], kept: Kept, batch_size: int, title: str) -> Iterator[Tensor]:
    """Yield the activations of images in batches, float32, on the CPU; every rank gets those of all images."""
    count = prefix.share.count
    # A multiple of the ranks: each batch then begins with the first rank's part, as `interleave` expects.
    batches = open_batches(prefix, entries, kept, -(-batch_size // count) * count)
    for part in tqdm(batches, desc=title, unit="batch", disable=None):
        yield interleave(part.inputs[: len(part.labels)].float().cpu())


def interleave(rows: Tensor | None) -> Tensor:
    """Return the rows of all ranks in order, (n, ...), on the CPU; each rank gives those of its share, or `None`."""
    parts = [part for part in ranks.gather(rows) if part is not None and len(part)]
    if len(parts) == 1:
        return parts[0]
    every = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for number, part in enumerate(parts):
        every[number :: ranks.count()] = part
    return every


class _Rows(Batches):
    """Batches of cached rows; all are on the GPU if they fit into half of its free memory."""

    def __init__(
        self, prefix: FrozenPrefix, entries: list[Entry], kept: Kept, batch_size: int, shuffle_seed: int | None
    ) -> None:
        super().__init__(prefix, entries, batch_size, shuffle_seed)
        self.kept, self.entries, self.device = kept, entries, prefix.device
        self.labels = torch.tensor([entry.label for entry in entries], device=self.device)
        self.resident: Tensor | None = None
        if self.device.type == "cuda":
            needed = kept.gather(entries[:1]).nbytes * len(entries)
            if needed < torch.cuda.mem_get_info(self.device)[0] // 2:
                parts = range(0, len(entries), READ_AT_ONCE)
                self.resident = torch.cat([self._read(entries[first : first + READ_AT_ONCE]) for first in parts])

    def __iter__(self) -> Iterator[Part]:
        positions = [position for position, _ in self.order]
        on_device = torch.tensor(positions, dtype=torch.int64, device=self.device)
        first, inputs = 0, torch.empty(0, device=self.device)
        for places, whole in self.parts:
            stop_if_interrupted()
            batch = slice(first, first + len(places))
            chosen, first = on_device[batch], first + len(places)
            if not places:
                inputs = inputs[:1]
            elif self.resident is None:
                inputs = self._read([self.entries[position] for position in positions[batch]])
            else:
                inputs = self.resident[chosen]
            yield Part(inputs, self.labels[chosen], places, whole)

    def _read(self, entries: list[Entry]) -> Tensor:
        rows = self.kept.gather(entries)
        rows = rows.pin_memory() if self.device.type == "cuda" else rows
        return rows.to(self.device, non_blocking=True)


class _Live(Batches):
    """Batches that the prefix computes on the fly, perhaps of augmented images."""

    def __init__(
        self, prefix: FrozenPrefix, entries: list[Entry], batch_size: int, augment: Augment, shuffle_seed: int | None
    ) -> None:
        super().__init__(prefix, entries, batch_size, shuffle_seed)
        self.images, self.prefix = prefix.read(entries, batch_size, augment, self.order), prefix

    def __iter__(self) -> Iterator[Part]:
        activations = torch.empty(0, device=self.prefix.device)
        for (images, labels), (places, whole) in zip(self.images, self.parts, strict=True):
            (activations,) = self.prefix.forward(images) if places else (activations[:1],)
            yield Part(activations, labels.to(self.prefix.device, non_blocking=True), places, whole)
