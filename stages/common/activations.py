"""What the frozen prefix of a network makes of the pictures: computed once and kept, or live.

Activations are kept in the user's cache, by content: a folder's name is a hash of the prefix, the preprocessing and the
precision, and in it a picture's row is found by the SHA-256 of its file. So a stale value cannot be read, and another
rate, seed or split reads what an earlier run wrote. `python -m stages.common.activations` tells the cache's size.
"""

import argparse
import hashlib
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from stages.common import cache
from stages.common.command import run, stop_if_interrupted
from stages.common.device import Precision, autocast
from stages.common.files import write_bytes
from stages.common.fusion import fold_batchnorm
from stages.common.images import Augment, Batch, Batches, Order, Preprocessing
from stages.common.index import Entry

# Part of each folder's name: to be raised when the same prefix and picture give other values than before.
_FORMAT = 1
_KEY = "activations"
_FILE_BYTES = 2**26
# One size for all: the last digits of a convolution may hang on the number of pictures in the batch.
_BATCH = 32


@dataclass(frozen=True)
class Source:
    """Where activations come from.

    `root` is the folder that the entries' paths are relative to; `prefix` is on `device`, all of it frozen.
    """

    root: Path
    preprocessing: Preprocessing
    prefix: nn.Sequential
    device: torch.device
    precision: Precision
    workers: int


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


@dataclass
class Kept:
    """Activations on disk: each row is read, through a memory map, when it is asked for."""

    rows: dict[str, tuple[Tensor, int]] = field(default_factory=dict)  # SHA-256 -> a file's tensor, the row in it
    files: list[BinaryIO] = field(default_factory=list)  # open while in use, so that no process removes them

    def gather(self, entries: list[Entry]) -> Tensor:
        """Return the activations of some pictures: (n, ...)."""
        found = (self.rows[entry.sha256] for entry in entries)
        return torch.stack([tensor[row] for tensor, row in found])


def keep(source: Source, entries: list[Entry], max_gigabytes: float, also_before: int | None = None) -> Kept | None:
    """Find the activations of pictures in the cache; compute those that are not there, once, and keep them.

    Where they cannot be kept, a line says why.

    Args:
        source: where from.
        entries: the pictures.
        max_gigabytes: of the whole cache; it has to hold all of them.
        also_before: a number of blocks. What enters the last so many is kept in the same pass, for a later stage that
            trains them.

    Returns:
        The activations, or `None` where they cannot be kept.

    Raises:
        StageError: a picture is gone or changed since the index was made.
    """
    cuts = [len(source.prefix)]
    if also_before is not None and 0 < also_before <= len(source.prefix):
        cuts.append(len(source.prefix) - also_before)
    folders = _folders(source)
    pictures = {entry.sha256: entry for entry in entries}
    found = _find(folders[cuts[0]], pictures.keys())
    if len(found.rows) == len(pictures):
        return found
    try:
        with cache.one_at_a_time(folders[cuts[0]], "waiting for another process that computes the same activations"):
            _compute(source, pictures, {cut: folders[cut] for cut in cuts}, max_gigabytes)
        found = _find(folders[cuts[0]], pictures.keys())
    except OSError as error:
        print(f"activations are not kept, but computed each time: {cache.explain(error)}", flush=True)
        return None
    return found if len(found.rows) == len(pictures) else None


def make_inputs(
    source: Source,
    kept: Kept | None,
    entries: list[Entry],
    batch_size: int,
    augment: Augment = "none",
    shuffle_seed: int | None = None,
) -> Inputs:
    """Return batches of activations: kept ones where there are any, live ones of augmented pictures in any case.

    Args:
        source: where from.
        kept: as `keep` returns it, with all of `entries`.
        entries: the pictures.
        batch_size: pictures a batch; the last one may be smaller.
        augment: for training pictures only.
        shuffle_seed: as in `Batches`.
    """
    if kept is not None and augment == "none":
        return _KeptInputs(kept, entries, batch_size, shuffle_seed, source.device)
    pinned = source.device.type == "cuda"
    pictures = Batches(
        source.root, entries, source.preprocessing, batch_size, source.workers, augment, shuffle_seed, pinned
    )
    return _LiveInputs(source, pictures)


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
    tensor, row = kept.rows[entries[0].sha256]
    return tensor[row].nbytes * len(entries) < torch.cuda.mem_get_info(device)[0] // 2


class _LiveInputs:
    def __init__(self, source: Source, pictures: Batches) -> None:
        self.pictures, self.device = pictures, source.device
        self.forward, self.blocks = _make_forward(source), len(source.prefix)

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.pictures:
            (activations,) = self.forward(images, [self.blocks])
            yield activations, labels.to(self.device, non_blocking=True)

    def set_epoch(self, epoch: int) -> None:
        self.pictures.set_epoch(epoch)


def _make_forward(source: Source) -> Callable[[Tensor, list[int]], list[Tensor]]:
    """Return images, numbers of blocks -> what the prefix makes of them after so many blocks, contiguous."""
    blocks = fold_batchnorm(source.prefix).eval().to(memory_format=torch.channels_last)

    # Not inference_mode: its tensors cannot enter what autograd looks at.
    @torch.no_grad()
    def forward(images: Tensor, cuts: list[int]) -> list[Tensor]:
        activations = images.to(source.device, memory_format=torch.channels_last, non_blocking=True)
        after = {0: activations}
        with autocast(source.device, source.precision):
            for number, block in enumerate(blocks, start=1):
                activations = block(activations)
                if number in cuts:
                    after[number] = activations
        return [after[cut].to(source.precision.dtype).contiguous() for cut in cuts]

    return forward


def _folders(source: Source) -> list[Path]:
    """Return where the activations after 0, 1, 2 ... blocks of the prefix are kept."""
    about = {
        "format": _FORMAT,
        "preprocessing": asdict(source.preprocessing),
        "precision": source.precision.value,
        # The same computation elsewhere differs in its last digits.
        "device": source.device.type,
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    names = [digest.hexdigest()]
    for block in source.prefix:
        digest.update(repr(block).encode())
        for key, tensor in block.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        names.append(digest.hexdigest())
    return [cache.cache_folder() / "activations" / name[:40] for name in names]


def _compute(source: Source, pictures: dict[str, Entry], folders: dict[int, Path], max_gigabytes: float) -> None:
    """Compute and write what is missing in any of `folders`, by number of blocks; the first one is what is needed.

    Raises:
        OSError: it cannot be written.
    """
    cuts = list(folders)
    forward = _make_forward(source)
    crop = source.preprocessing.crop
    sizes = [tensor.nbytes for tensor in forward(torch.zeros(1, 3, crop, crop), cuts)]
    present = [_find(folders[cut], pictures.keys()) for cut in cuts]
    missing = [[entry for sha256, entry in pictures.items() if sha256 not in kept.rows] for kept in present]
    if len(cuts) > 1:
        try:
            cache.make_room(sum(len(absent) * size for absent, size in zip(missing, sizes, strict=True)), max_gigabytes)
        except cache.FullError:  # what only a later stage needs can be left to it
            cuts, missing, sizes = cuts[:1], missing[:1], sizes[:1]
    if not missing[0]:
        return
    cache.make_room(len(missing[0]) * sizes[0], max_gigabytes)
    # A picture that only lacks what a later stage needs is left to that stage.
    needed = missing[0]
    writers = [
        _Writer(folders[cut], {entry.sha256 for entry in absent}) for cut, absent in zip(cuts, missing, strict=True)
    ]
    started = time.monotonic()
    batches = Batches(source.root, needed, source.preprocessing, _BATCH, source.workers)
    with tqdm(total=len(needed), desc="activations", unit=" pictures", disable=None) as progress:
        first = 0
        for images, _ in batches:
            count = len(images)
            padded = torch.cat([images, images.new_zeros(_BATCH - count, *images.shape[1:])])
            hashes = [entry.sha256 for entry in needed[first : first + count]]
            for writer, activations in zip(writers, forward(padded, cuts), strict=True):
                writer.add(hashes, activations[:count].cpu())
            first += count
            progress.update(count)
    for writer in writers:
        writer.flush()
    if not sys.stderr.isatty():
        seconds = time.monotonic() - started
        print(f"activations: {len(needed):,} pictures, {len(needed) / seconds:.0f} pictures/s", flush=True)


class _Writer:
    """Collects rows and writes them, a file at a time."""

    def __init__(self, folder: Path, wanted: set[str]) -> None:
        self.folder, self.wanted = folder, wanted
        self.hashes: list[str] = []
        self.rows: list[Tensor] = []

    def add(self, hashes: list[str], activations: Tensor) -> None:
        for sha256, row in zip(hashes, activations, strict=True):
            if sha256 in self.wanted:
                self.hashes.append(sha256)
                self.rows.append(row)
        if self.rows and len(self.rows) * self.rows[0].nbytes >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        tensor = torch.stack(self.rows)
        about = {"pictures": self.hashes, "crc32": [_checksum(row) for row in tensor]}
        name = hashlib.sha256("".join(self.hashes).encode()).hexdigest()[:40]
        content = safetensors.torch.save({_KEY: tensor}, {_KEY: json.dumps(about)})
        write_bytes(self.folder / f"{name}.safetensors", content)
        self.hashes, self.rows = [], []


def _checksum(row: Tensor) -> int:
    return zlib.crc32(row.contiguous().flatten().view(torch.uint8).numpy().data)


def _find(folder: Path, hashes: Collection[str]) -> Kept:
    """Return what a folder holds of some pictures; a file that is damaged is removed, with a line."""
    kept = Kept()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            _add(path, hashes, kept)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            print(f"{path}: damaged ({error}); its activations are computed again", flush=True)
            with suppress(OSError):
                path.unlink()
        except OSError:  # another process removed it just now, or it may not be read
            continue
    return kept


def _add(path: Path, hashes: Collection[str], kept: Kept) -> None:
    file = cache.open_used(path)
    try:
        with safe_open(path, framework="pt") as content:
            about = json.loads(content.metadata()[_KEY])
            tensor = content.get_tensor(_KEY)  # a memory map: its bytes are read when they are used
        rows: dict[str, tuple[Tensor, int]] = {}
        for row, (sha256, checksum) in enumerate(zip(about["pictures"], about["crc32"], strict=True)):
            if sha256 in hashes and sha256 not in kept.rows:
                if _checksum(tensor[row]) != checksum:
                    raise ValueError("a checksum is wrong")
                rows[sha256] = tensor, row
    except BaseException:
        file.close()
        raise
    if not rows:
        file.close()
        return
    kept.rows |= rows
    kept.files.append(file)


def main() -> None:
    """Tell how large the cache is, or empty it."""
    parser = argparse.ArgumentParser(prog="python -m stages.common.activations", description=main.__doc__)
    parser.add_argument("--clear", action="store_true", help="remove all that no process uses")
    if parser.parse_args().clear:
        print(f"{cache.clear() / 1e9:.2f} GB removed")
    files, size = cache.size()
    print(f"{cache.cache_folder()}: {files} files, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    run(main)
