"""What the frozen prefix of a network makes of the pictures: computed once and kept, or live.

Activations are kept in the user's cache, by content: a folder's name is a hash of the prefix, the preprocessing and the
precision, and in it a picture's row is found by the SHA-256 of its file. So a stale value cannot be read, and another
rate, seed or split reads what an earlier run wrote.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from stages.common import processes
from stages.common.device import autocast, dtype_of
from stages.common.memory import require_memory
from stages.common.params import Augment, Precision
from stages.common.processes import Share
from stages.common.seeds import generator_for
from stages.common.stage import stop_if_interrupted
from stages.network.footprint import widest_layer
from stages.pictures.batches import Batches, Order
from stages.pictures.index import Entry
from stages.pictures.preprocessing import Preprocessing
from stages.training import cache
from stages.training.fusion import fold_batchnorm
from stages.training.parallel import interleave
from stages.training.store import FILE_OVERHEAD, ROW_OVERHEAD, Kept, Writer, find

# Part of each folder's name: to be raised when the same prefix and picture give other values than before.
_FORMAT = 2
# One size for all: the last digits of a convolution may depend on the number of pictures in the batch.
_BATCH = 32
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


@dataclass(frozen=True)
class View:
    """One of several augmented versions of each picture: which augmentation, with which seed, and which version."""

    augment: Augment
    seed: int
    number: int

    def seed_of(self, entry: Entry) -> int:
        """Return the seed of a picture's version; it depends on nothing else of the index."""
        text = f"{self.seed} {self.number} {entry.sha256}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 2**62


@dataclass(frozen=True)
class FrozenPrefix:
    """The blocks that training does not change, and the pictures that go through them.

    `blocks` are on `device`, all of them frozen; `behind` are more of them, whose results are not kept: what is kept
    goes through them each time it is used; `root` is the folder that the entries' paths are relative to; `view`:
    the version of each picture that is kept, `None` for the picture as it is; `share`: what this process computes of a
    pass, if there are several. All of them then call the same methods with the same pictures.
    """

    blocks: nn.Sequential
    root: Path
    preprocessing: Preprocessing
    device: torch.device
    precision: Precision
    workers: int
    view: View | None = None
    share: Share = field(default_factory=Share)
    behind: nn.Sequential = field(default_factory=nn.Sequential)

    def fit(self, blocks: int, rows: int, max_gigabytes: float) -> "FrozenPrefix":
        """Return a prefix that keeps what enters its last blocks, if there is no room for what leaves them.

        In float32 the values are the same bytes. Going through some blocks again takes longer than reading what was
        kept, but a fraction of going through all: of MobileNetV3-Large, what leaves the last three blocks has six times
        the bytes.

        Args:
            blocks: the last ones of the prefix that may be gone through each time.
            rows: how many there are to keep.
            max_gigabytes: of the whole cache.
        """
        count = len(self.blocks) - blocks
        if not 0 <= count < len(self.blocks):
            return self
        crop = self.preprocessing.crop
        forward = _make_forward(self)
        before, after = (
            row.nbytes + ROW_OVERHEAD for row in forward(torch.zeros(1, 3, crop, crop), [count, len(self.blocks)])
        )
        room = processes.agree(_find_room(max_gigabytes))
        if min(rows, room // before) <= min(rows, room // after):
            return self
        print(f"kept before the last {blocks} blocks: {before:,} bytes a picture; {after:,} behind them have no room")
        return replace(self, blocks=self.blocks[:count], behind=self.blocks[count:])

    def keep(self, entries: list[Entry], max_gigabytes: float, also: Mapping[int, list[Entry]] | None = None) -> Kept:
        """Find the activations of pictures in the cache; compute those that are not there, once, and keep them.

        As many are kept as there is room for. Where that is not all, a line says why. Several processes of one store
        compute a part each, and find all.

        Args:
            entries: the pictures; the same in all processes of a store.
            max_gigabytes: of the whole cache.
            also: a number of blocks -> pictures. What enters the last so many blocks is kept in the same pass, of those
                of these pictures that go through it, for a later stage that trains the blocks.

        Returns:
            The activations, not necessarily of all pictures.

        Raises:
            StageError: a picture is gone or changed since the index was made.
        """
        kept, problem = self._keep(entries, max_gigabytes, also or {})
        if missing := kept.missing(entries):
            left = "activations are" if not kept.rows else f"activations of {len(missing):,} pictures are"
            print(f"{left} not kept, but computed each time: {_explain(problem)}", flush=True)
        return kept

    def keep_views(
        self,
        entries: list[Entry],
        count: int,
        augment: Augment,
        seed: int,
        max_gigabytes: float,
        also: Mapping[int, list[Entry]] | None = None,
    ) -> list[Kept]:
        """Do the same for several augmented versions of each picture, for `batches` to choose from.

        Where there is not room for all of them, there are fewer, and a line says why.

        Args:
            entries: the pictures.
            count: of versions.
            augment: how they are made.
            seed: the same versions for the same one.
            max_gigabytes: as for `keep`.
            also: as for `keep`.

        Returns:
            The activations of each version, of all pictures.
        """
        views: list[Kept] = []
        for number in range(count):
            prefix = replace(self, view=View(augment, seed, number))
            kept, problem = prefix._keep(entries, max_gigabytes, also or {}, all_or_none=True)
            if any(processes.gather(bool(kept.missing(entries)))):
                print(
                    f"{number} of {count} augmented versions of each picture are kept: {_explain(problem)}", flush=True
                )
                break
            views.append(kept)
        return views

    def _keep(
        self,
        entries: list[Entry],
        max_gigabytes: float,
        also: Mapping[int, list[Entry]],
        all_or_none: bool = False,
    ) -> tuple[Kept, OSError | None]:
        """Return what can be kept, and why not all if anything was in the way."""
        count = len(self.blocks)
        folders = _folders(self)
        kept = Kept()
        kept.hold(folders[count])
        kept.add(find(folders[count], {entry.sha256 for entry in entries}))
        if kept.missing(entries):
            # So that rows of pictures which nobody asks for any more may go. What was found stays readable.
            kept.release()
        if not any(processes.gather(bool(kept.missing(entries)))):
            return kept, None
        later = {
            folders[count + len(self.behind) - blocks]: {entry.sha256 for entry in pictures}
            for blocks, pictures in also.items()
            if len(self.behind) < blocks <= count + len(self.behind)
        }
        cuts = [count, *map(folders.index, later)]
        forward = _make_forward(self)
        with ExitStack() as stack:

            def plan() -> _Plan:
                waiting = "waiting for another process that computes the same activations"
                stack.enter_context(cache.one_at_a_time(folders[count], waiting))
                kept.add(find(folders[count], kept.missing(entries).keys()))
                crop = self.preprocessing.crop
                sizes = [row.nbytes + ROW_OVERHEAD for row in forward(torch.zeros(1, 3, crop, crop), cuts)]
                return _make_plan(entries, kept, later, sizes, max_gigabytes, all_or_none)

            planned = self._ask_leader(plan)
            problem = planned.problem
            try:
                _compute(self, forward, [folders[cut] for cut in cuts], cuts, entries, planned.wanted)
            except OSError as error:
                problem = error
            problems = processes.gather(problem)
        kept.hold(folders[count])
        kept.add(find(folders[count], kept.missing(entries).keys()))
        return kept, next((problems[rank] for rank in self.share.team if problems[rank] is not None), None)

    def _ask_leader(self, plan: Callable[[], "_Plan"]) -> "_Plan":
        """Let the first process of this store make the plan for all of them."""
        planned = _Plan([], None)
        if self.share.leads:
            try:
                planned = plan()
            except OSError as error:
                planned = _Plan([], error)
        return processes.gather(planned)[self.share.team[0]]

    def batches(
        self,
        entries: list[Entry],
        kept: Kept,
        batch_size: int,
        augment: Augment = "none",
        shuffle_seed: int | None = None,
        views: Sequence[Kept] = (),
    ) -> Inputs:
        """Return batches of activations; those that are not kept, and those of augmented pictures, are computed live.

        Without augmentation, the bytes do not depend on what is kept.

        Args:
            entries: the pictures.
            kept: as `keep` returns it.
            batch_size: pictures per batch; the last one may be smaller.
            augment: for training pictures only.
            shuffle_seed: each epoch takes another order, the same ones for the same seed; `None` keeps the index's.
            views: of augmented pictures, as `keep_views` returns them; without any, they are computed live.
        """
        inputs: Inputs
        if augment == "none":
            inputs = _Rows(self, entries, kept, batch_size, shuffle_seed)
        elif views:
            inputs = _Views(self, entries, views, batch_size, shuffle_seed)
        else:
            inputs = _Augmented(self, entries, batch_size, augment, shuffle_seed)
        return _Through(self, inputs) if len(self.behind) else inputs

    def read(self, entries: list[Entry], batch_size: int, augment: Augment, order: Order) -> Batches:
        """Return batches of preprocessed pictures, not yet seen by the blocks."""
        pinned = self.device.type == "cuda"
        return Batches(self.root, entries, self.preprocessing, batch_size, self.workers, augment, order, pinned)


def read_all(prefix: FrozenPrefix, entries: list[Entry], kept: Kept, batch_size: int, title: str) -> Iterator[Tensor]:
    """Yield the activations of pictures in batches, float32, on the CPU; in all processes those of all pictures.

    Args:
        prefix: whose activations.
        entries: the pictures.
        kept: as `FrozenPrefix.keep` returns it.
        batch_size: of pictures; the last one may be smaller.
        title: of the progress bar.
    """
    count = prefix.share.count
    # Each begins with the first process's part, so that it is put together as the whole index is.
    batches = prefix.batches(entries, kept, -(-batch_size // count) * count)
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
        self.resident = None if self.live else self._make_resident()

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
        return self._send(self.kept.gather(entries))

    def _send(self, inputs: Tensor) -> Tensor:
        if self.device.type == "cuda":
            inputs = inputs.pin_memory()
        return inputs.to(self.device, non_blocking=True)

    def _make_resident(self) -> "_Resident | None":
        return _make_resident(self.kept, self.entries, self.share, self.device)

    def set_epoch(self, epoch: int) -> None:
        self.order.epoch = epoch
        if self.live is not None:
            self.live.order.epoch = epoch


class _Views(_Rows):
    """Batches of rows, each from one of several versions of its picture; all are used before one comes again."""

    def __init__(
        self, prefix: FrozenPrefix, entries: list[Entry], views: Sequence[Kept], batch_size: int, seed: int | None
    ) -> None:
        super().__init__(prefix, entries, views[0], batch_size, seed)
        self.views, self.chosen = views, dict.fromkeys((entry.sha256 for entry in entries), 0)

    def _gather(self, entries: list[Entry], live: Iterator[Tensor]) -> Tensor:
        rows = [self.views[self.chosen[entry.sha256]].row(entry) for entry in entries]
        return self._send(torch.stack(rows))

    def _make_resident(self) -> None:
        return None

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        chosen = choose_views(len(self.entries), len(self.views), self.order.seed or 0, epoch)
        self.chosen = {entry.sha256: view for entry, view in zip(self.entries, chosen, strict=True)}


def choose_views(pictures: int, views: int, seed: int, epoch: int) -> list[int]:
    """Return which version of each picture an epoch takes: in `views` epochs each one once, in an order of its own.

    Args:
        pictures: their number.
        views: number of versions of each.
        seed: the same orders for the same one.
        epoch: counts from 1.
    """
    turn, place = divmod(epoch - 1, views)
    generator = generator_for(seed, turn, views)
    orders = torch.rand(pictures, views, generator=generator).argsort(dim=1)
    chosen: list[int] = orders[:, place].tolist()
    return chosen


class _LiveRows:
    """The rows of those pictures that are not kept, one by one, in the order in which batches ask for them."""

    def __init__(
        self, prefix: FrozenPrefix, entries: list[Entry], absent: Collection[str], shuffle_seed: int | None
    ) -> None:
        positions = {position for position, entry in enumerate(entries) if entry.sha256 in absent}
        self.order = Order(len(entries), shuffle_seed, positions, share=prefix.share)
        self.pictures = prefix.read(entries, _BATCH, "none", self.order)
        self.forward, self.blocks = _make_forward(prefix), len(prefix.blocks)

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self.pictures:
            (rows,) = self.forward(_pad(images), [self.blocks])
            yield from rows[: len(images)]


class _Augmented:
    """Batches of what the prefix makes of augmented pictures."""

    def __init__(
        self, prefix: FrozenPrefix, entries: list[Entry], batch_size: int, augment: Augment, shuffle_seed: int | None
    ) -> None:
        self.order = Order(len(entries), shuffle_seed, share=prefix.share)
        self.parts = _divide(prefix.share, entries, batch_size)
        self.pictures, self.device = prefix.read(entries, batch_size, augment, self.order), prefix.device
        self.forward, self.blocks = _make_forward(prefix), len(prefix.blocks)

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
        self.forward = _forward_through(prefix.behind, prefix)

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[Part]:
        for part in self.inputs:
            rows = [self._through(part.inputs[first : first + _BATCH]) for first in range(0, len(part.inputs), _BATCH)]
            yield part._replace(inputs=torch.cat(rows)) if rows else part

    def _through(self, activations: Tensor) -> Tensor:
        (rows,) = self.forward(_pad(activations), [self.blocks])
        return rows[: len(activations)]

    def set_epoch(self, epoch: int) -> None:
        self.inputs.set_epoch(epoch)


def _find_room(max_gigabytes: float) -> int:
    try:
        room = cache.find_room([cache.activations_folder()], max_gigabytes)
    except OSError:
        return 0
    return max(0, min(room.limit, room.disk))


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


def _pad(images: Tensor) -> Tensor:
    return torch.cat([images, images.new_zeros(_BATCH - len(images), *images.shape[1:])])


def _make_forward(prefix: FrozenPrefix) -> Callable[[Tensor, Collection[int]], list[Tensor]]:
    """Return images, numbers of blocks -> what the prefix makes of them after so many blocks, contiguous."""
    if prefix.device.type == "cpu":
        crop = prefix.preprocessing.crop
        # A batch stays there, as read and as padded, until its rows are computed.
        require_memory(_BATCH, widest_layer(prefix.blocks, crop) + 2 * 3 * crop**2 * 4, crop)
    return _forward_through(prefix.blocks, prefix)


def _forward_through(frozen: nn.Sequential, prefix: FrozenPrefix) -> Callable[[Tensor, Collection[int]], list[Tensor]]:
    # Block by block: what leaves a block has to be what the plain network has there.
    blocks = [fold_batchnorm(block).eval().to(memory_format=torch.channels_last) for block in frozen]

    # Not inference_mode: its tensors cannot enter what autograd looks at.
    @torch.no_grad()
    def forward(images: Tensor, cuts: Collection[int]) -> list[Tensor]:
        # Tokens have no such layout: it is one of maps.
        layout = torch.channels_last if images.dim() == 4 else torch.contiguous_format
        activations = images.to(prefix.device, memory_format=layout, non_blocking=True)
        after: dict[int, Tensor] = {}
        with autocast(prefix.device, prefix.precision):
            for number, block in enumerate([nn.Identity(), *blocks]):
                activations = block(activations)
                if number in cuts:
                    # A copy: the next block may begin with a layer that works in place.
                    kept = torch.empty(activations.shape, dtype=dtype_of(prefix.precision), device=prefix.device)
                    after[number] = kept.copy_(activations)
        return [after[cut] for cut in cuts]

    return forward


def _read_once(prefix: FrozenPrefix, entries: list[Entry]) -> Batches:
    """Return batches of the versions of pictures that are kept."""
    if prefix.view is None:
        return prefix.read(entries, _BATCH, "none", Order(len(entries)))
    seeds = [prefix.view.seed_of(entry) for entry in entries]
    return prefix.read(entries, _BATCH, prefix.view.augment, Order(len(entries), seeds=seeds))


def _explain(problem: OSError | None) -> str:
    return "another process removed them" if problem is None else cache.explain(problem)


def _folders(prefix: FrozenPrefix) -> list[Path]:
    """Return where the activations after 0, 1, 2 ... blocks of the prefix are kept."""
    about: dict[str, object] = {
        "format": _FORMAT,
        "preprocessing": prefix.preprocessing.to_json(),
        "precision": prefix.precision,
        # The same computation elsewhere differs in its last digits.
        "device": prefix.device.type,
        "torch": torch.__version__,
    }
    if prefix.view is not None:
        about["view"] = asdict(prefix.view)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    names = [digest.hexdigest()]
    for block in prefix.blocks:
        digest.update(repr(block).encode())
        for key, tensor in block.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        names.append(digest.hexdigest())
    return [cache.activations_folder() / name[:40] for name in names]


@dataclass(frozen=True)
class _Plan:
    """What to compute: for each cut, positions of pictures whose rows are kept; and why that is not all.

    The first cut is the one that is needed: only of pictures that it has can there be others.
    """

    wanted: list[list[int]]
    problem: OSError | None


def _make_plan(
    entries: list[Entry],
    kept: Kept,
    later: Mapping[Path, Set[str]],
    sizes: list[int],
    max_gigabytes: float,
    all_or_none: bool,
) -> _Plan:
    """Choose what there is room for, and make that room.

    What is kept for `later` (a folder -> the pictures it is wanted of) comes second: a stage of its own can compute
    that. With `all_or_none`, nothing is computed where there is not room for all that is needed.

    Args:
        entries: the pictures that are needed.
        kept: what is there of them.
        later: as above.
        sizes: bytes of a row, of what is needed and for each of `later`.
        max_gigabytes: of the whole cache.
        all_or_none: as above.

    Raises:
        OSError: the cache cannot be written.
    """
    positions = {entry.sha256: position for position, entry in enumerate(entries)}
    missing = list(kept.missing(entries))
    if not missing:
        return _Plan([], None)
    parts, spare = [cache.activations_folder()], set(kept.paths)
    room = cache.find_room(parts, max_gigabytes, spare)
    problem = room.why_not(len(missing) * sizes[0] + FILE_OVERHEAD)
    left = max(0, min(room.limit, room.disk) - len(sizes) * FILE_OVERHEAD)
    needed = [] if all_or_none and problem is not None else missing[: left // sizes[0]]
    if not needed:
        return _Plan([], problem)
    wanted = [needed]
    left -= len(needed) * sizes[0]
    for (folder, own), size in zip(later.items(), sizes[1:], strict=True):
        present = find(folder, own & set(needed))
        spare |= present.paths
        absent = (sha256 for sha256 in needed if sha256 in own and sha256 not in present.rows)
        wanted.append(list(islice(absent, left // size)))
        left -= len(wanted[-1]) * size
    total = sum(len(own) * size for own, size in zip(wanted, sizes, strict=True))
    cache.make_room(total, parts, max_gigabytes, spare)
    return _Plan([[positions[sha256] for sha256 in own] for own in wanted], problem)


def _compute(
    prefix: FrozenPrefix,
    forward: Callable[[Tensor, Collection[int]], list[Tensor]],
    folders: list[Path],
    cuts: list[int],
    entries: list[Entry],
    wanted: list[list[int]],
) -> None:
    """Compute this process's part of what is planned, and write it.

    Args:
        prefix: whose rows.
        forward: of its blocks.
        folders: for each cut.
        cuts: numbers of blocks.
        entries: the pictures.
        wanted: as in `_Plan`.

    Raises:
        OSError: it cannot be written.
    """
    needed = [entries[position] for position in prefix.share.of_team(wanted[0] if wanted else [])]
    if not needed:
        return
    started = time.monotonic()
    with ExitStack() as stack, tqdm(total=len(needed), desc="activations", unit=" pictures", disable=None) as progress:
        writers = [
            Writer(folder, {entries[position].sha256 for position in own})
            for folder, own in zip(folders, wanted, strict=True)
        ]
        for writer in writers:
            stack.callback(writer.close)
        position = 0
        for images, _ in _read_once(prefix, needed):
            count = len(images)
            batch = [entry.sha256 for entry in needed[position : position + count]]
            for writer, activations in zip(writers, forward(_pad(images), cuts), strict=True):
                writer.add(batch, activations[:count].cpu())
            position += count
            progress.update(count)
        for writer in writers:
            writer.flush()
    if not sys.stderr.isatty():
        seconds = time.monotonic() - started
        print(f"activations: {len(wanted[0]):,} pictures, {len(wanted[0]) / seconds:.0f} pictures/s", flush=True)
