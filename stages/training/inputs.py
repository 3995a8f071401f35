"""Batches for the tail of a network: rows of kept activations, or what the prefix makes of pictures on the way."""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from stages.common.cli import stop_if_interrupted
from stages.common.params import Augment
from stages.common.ranks import Share
from stages.images.batches import Order
from stages.images.index import Entry
from stages.training.parallel import interleave
from stages.training.prefix import BATCH, FrozenPrefix, pad
from stages.training.store import Kept

# Rows that go to a GPU at a time.
_GATHERED = 1024


class Part(NamedTuple):
    """This process's part of a batch for the tail of a network, on its device.

    `inputs`: activations, (n, ...); `labels`: (n,); `places`: n places in the batch; `whole`: pictures of the batch in
    all processes. Where n is 0, `inputs` is another picture that does not count, or empty.
    """

    inputs: Tensor
    labels: Tensor
    places: range
    whole: int


class Inputs(Protocol):
    """Batches for the tail of a network."""

    def __len__(self) -> int:
        """Return the number of batches."""
        ...

    def __iter__(self) -> Iterator[Part]:
        """Yield this process's part of each batch."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next pass."""
        ...


def open_batches(
    prefix: FrozenPrefix,
    entries: list[Entry],
    kept: Kept,
    batch_size: int,
    augment: Augment = "none",
    shuffle_seed: int | None = None,
) -> Inputs:
    """Return batches of activations; those that are not kept, and those of augmented pictures, are computed live.

    Without augmentation, the bytes do not depend on what is kept.

    Args:
        prefix: whose activations.
        entries: the pictures.
        kept: as `keep` returns it.
        batch_size: pictures per batch; the last one may be smaller.
        augment: for training pictures only.
        shuffle_seed: each epoch takes another order, the same ones for the same seed; `None` keeps the index's.
    """
    inputs: Inputs
    if augment == "none":
        inputs = _Rows(prefix, entries, kept, batch_size, shuffle_seed)
    else:
        inputs = _Augmented(prefix, entries, batch_size, augment, shuffle_seed)
    return _Through(prefix, inputs) if len(prefix.behind) else inputs


def read_all(prefix: FrozenPrefix, entries: list[Entry], kept: Kept, batch_size: int, title: str) -> Iterator[Tensor]:
    """Yield the activations of pictures in batches, float32, on the CPU; in all processes those of all pictures.

    Args:
        prefix: whose activations.
        entries: the pictures.
        kept: as `keep` returns it.
        batch_size: of pictures; the last one may be smaller.
        title: of the progress bar.
    """
    count = prefix.share.count
    # Each begins with the first process's part, so that it is put together as the whole index is.
    batches = open_batches(prefix, entries, kept, -(-batch_size // count) * count)
    for part in tqdm(batches, desc=title, unit="batch", disable=None):
        yield interleave(part.inputs[: len(part.labels)].float().cpu())


class _Rows:
    """Batches of rows. Those that are not kept are computed on the way, in batches of the size that kept ones had."""

    def __init__(
        self, prefix: FrozenPrefix, entries: list[Entry], kept: Kept, batch_size: int, shuffle_seed: int | None
    ) -> None:
        self.kept, self.entries, self.device, self.share = kept, entries, prefix.device, prefix.share
        self.parts = _divide(self.share, entries, batch_size)
        self.labels = torch.tensor([entry.label for entry in entries], device=self.device)
        self.order = Order(len(entries), shuffle_seed, share=self.share)
        absent = kept.missing(self.share.local(entries))
        self.live = _LiveRows(prefix, entries, absent, shuffle_seed) if absent else None
        self.resident = None if self.live else _make_resident(kept, entries, self.share, self.device)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Part]:
        return _one_ahead(self._batches()) if self._reads_while_the_gpu_computes else self._batches()

    @property
    def _reads_while_the_gpu_computes(self) -> bool:
        return self.device.type == "cuda" and self.resident is None

    def _batches(self) -> Iterator[Part]:
        positions = [position for position, _ in self.order]
        on_device = torch.tensor(positions, dtype=torch.int64, device=self.device)
        live, first, inputs = iter(self.live or ()), 0, torch.empty(0, device=self.device)
        for places, whole in self.parts:
            stop_if_interrupted()
            batch = slice(first, first + len(places))
            chosen, first = on_device[batch], first + len(places)
            if not places:
                inputs = inputs[:1]
            elif self.resident is None:
                inputs = self._gather([self.entries[position] for position in positions[batch]], live)
            else:
                inputs = self.resident.take(chosen)
            yield Part(inputs, self.labels[chosen], places, whole)

    def _gather(self, entries: list[Entry], live: Iterator[Tensor]) -> Tensor:
        if self.live is not None:
            rows = (self.kept.row(entry) if entry.sha256 in self.kept.rows else next(live) for entry in entries)
            return torch.stack([row.to(self.device) for row in rows])
        inputs = self.kept.gather(entries)
        if self.device.type == "cuda":
            inputs = inputs.pin_memory()
        return inputs.to(self.device, non_blocking=True)

    def set_epoch(self, epoch: int) -> None:
        self.order.epoch = epoch
        if self.live is not None:
            self.live.order.epoch = epoch


class _LiveRows:
    """The rows of those pictures that are not kept, one by one, in the order in which batches ask for them."""

    def __init__(
        self, prefix: FrozenPrefix, entries: list[Entry], absent: Collection[str], shuffle_seed: int | None
    ) -> None:
        positions = {position for position, entry in enumerate(entries) if entry.sha256 in absent}
        self.order = Order(len(entries), shuffle_seed, positions, share=prefix.share)
        self.pictures = prefix.read(entries, BATCH, "none", self.order)
        self.forward, self.blocks = prefix.forward, len(prefix.blocks)

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self.pictures:
            (rows,) = self.forward(pad(images), [self.blocks])
            yield from rows[: len(images)]


class _Augmented:
    """Batches of what the prefix makes of augmented pictures."""

    def __init__(
        self, prefix: FrozenPrefix, entries: list[Entry], batch_size: int, augment: Augment, shuffle_seed: int | None
    ) -> None:
        self.order = Order(len(entries), shuffle_seed, share=prefix.share)
        self.parts = _divide(prefix.share, entries, batch_size)
        self.pictures, self.device = prefix.read(entries, batch_size, augment, self.order), prefix.device
        self.forward, self.blocks = prefix.forward, len(prefix.blocks)

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Part]:
        activations = torch.empty(0, device=self.device)
        for (images, labels), (places, whole) in zip(self.pictures, self.parts, strict=True):
            (activations,) = self.forward(images, [self.blocks]) if places else (activations[:1],)
            yield Part(activations, labels.to(self.device, non_blocking=True), places, whole)

    def set_epoch(self, epoch: int) -> None:
        self.order.epoch = epoch


class _Through:
    """Batches of what the blocks behind a prefix make of its activations, in batches of the size that kept ones had."""

    def __init__(self, prefix: FrozenPrefix, inputs: Inputs) -> None:
        self.inputs, self.blocks = inputs, len(prefix.behind)
        self.forward = prefix.forward_behind

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[Part]:
        for part in self.inputs:
            rows = [self._through(part.inputs[first : first + BATCH]) for first in range(0, len(part.inputs), BATCH)]
            yield part._replace(inputs=torch.cat(rows)) if rows else part

    def _through(self, activations: Tensor) -> Tensor:
        (rows,) = self.forward(pad(activations), [self.blocks])
        return rows[: len(activations)]

    def set_epoch(self, epoch: int) -> None:
        self.inputs.set_epoch(epoch)


def _divide(share: Share, entries: list[Entry], batch_size: int) -> list[tuple[range, int]]:
    """Return this process's places in each batch, and how many pictures there are in it."""
    own, whole = (each.places(len(entries), batch_size) for each in (share, Share()))
    return [(places, len(every)) for places, every in zip(own, whole, strict=True)]


@dataclass(frozen=True)
class _Resident:
    """Rows in a GPU's memory; `places`: where those of each position are."""

    rows: Tensor
    places: Tensor

    def take(self, positions: Tensor) -> Tensor:
        return self.rows[self.places[positions]]


def _make_resident(kept: Kept, entries: list[Entry], share: Share, device: torch.device) -> _Resident | None:
    """Put all activations on a GPU, where they fit into half of what is free: the rest is for training."""
    positions = share.local(range(len(entries)))
    if device.type != "cuda" or not positions:
        return None
    row = kept.row(entries[positions[0]])
    if row.nbytes * len(positions) >= torch.cuda.mem_get_info(device)[0] // 2:
        return None
    resident = torch.empty((len(positions), *row.shape), dtype=row.dtype, device=device)
    places = torch.zeros(len(entries), dtype=torch.int64)
    places[positions] = torch.arange(len(positions))
    # In parts: together they may be more than the computer's own memory holds.
    for first in range(0, len(positions), _GATHERED):
        rows = kept.gather(entries[position] for position in positions[first : first + _GATHERED])
        resident[first : first + len(rows)] = rows.to(device)
    return _Resident(resident, places.to(device))


def _one_ahead(batches: Iterator[Part]) -> Iterator[Part]:
    """Yield the same, and get the next one meanwhile, in a thread."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch
