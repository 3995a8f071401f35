"""Activations of the frozen blocks: looked up in the user's cache, computed if missing, and stored there.

Each depth has a folder in the cache, named by a hash of the blocks, the preprocessing, the precision, and the code and
libraries that compute the activations. Within it, a row is found by the SHA-256 of its image file. So no stale row is
read, and runs with another learning rate, seed or split share rows.
"""

import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

import stages
from stages.common import ranks
from stages.common.device import autocast, dtype_of
from stages.common.files import hash_code, write_bytes
from stages.common.params import Augment, Precision
from stages.images.batches import Batches, Order
from stages.images.index import Entry
from stages.images.preprocessing import Preprocessing
from stages.training import cache
from stages.training.kernels import fold_batchnorm

# Always the same: the last digits of a convolution may depend on the batch size.
BATCH = 32
_KEY = "activations"
_FILE_BYTES = 2**26
# Bytes of a row beside its values: the hash of its image and its checksum as JSON, and a share of the header.
ROW_OVERHEAD = 110
# Beside torch, the libraries on which an activation depends.
_LIBRARIES = ("pillow", "pillow-heif", "torchvision")
_CODE = ("images", "network", "training/features.py", "training/kernels.py")


@dataclass(frozen=True)
class FrozenPrefix:
    """The frozen blocks on `device`, and the preprocessing of images below `root` for them.

    Each rank computes its `share`; all ranks make the same calls.
    """

    blocks: nn.Sequential
    root: Path
    preprocessing: Preprocessing
    device: torch.device
    precision: Precision
    workers: int
    share: ranks.Share = field(default_factory=ranks.share)

    def read(self, entries: list[Entry], batch_size: int, augment: Augment, order: Order) -> Batches:
        """Return batches of preprocessed images, not yet seen by the blocks."""
        pinned = self.device.type == "cuda"
        return Batches(self.root, entries, self.preprocessing, batch_size, self.workers, augment, order, pinned)

    @cached_property
    def _folded(self) -> list[nn.Module]:
        """The blocks with BatchNorm folded into convolutions; each by itself, since its output may be stored."""
        return [fold_batchnorm(block).eval().to(memory_format=torch.channels_last) for block in self.blocks]

    # Not inference_mode, whose tensors autograd refuses.
    @torch.no_grad()
    def forward(self, images: Tensor, cuts: Collection[int] | None = None) -> list[Tensor]:
        """Return the activations after each number of blocks in `cuts` (default: all), contiguous, (n, ...) each.

        An image's activations do not depend on the other images or their number, to the last digit.
        """
        cuts = [len(self.blocks)] if cuts is None else cuts
        after: list[list[Tensor]] = [[] for _ in cuts]
        for batch in torch.split(images, BATCH):
            full = torch.cat([batch, batch.new_zeros(BATCH - len(batch), *batch.shape[1:])])
            activations = full.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            with autocast(self.device, self.precision):
                for number, block in enumerate([nn.Identity(), *self._folded]):
                    activations = block(activations)
                    for rows, cut in zip(after, cuts, strict=True):
                        if cut == number:
                            # A copy: the next block may begin with an in-place layer.
                            kept = torch.empty(activations.shape, dtype=dtype_of(self.precision), device=self.device)
                            rows.append(kept.copy_(activations)[: len(batch)])
        return [torch.cat(rows) for rows in after]

    def names(self) -> list[str]:
        """Return a name for the activations after 0, 1, 2 ... blocks: a hash of everything they depend on."""
        about: dict[str, object] = {
            "preprocessing": self.preprocessing.to_json(),
            "precision": self.precision,
            # Devices differ in the last digits.
            "device": self.device.type,
            "libraries": [torch.__version__, *map(_version, _LIBRARIES)],
            "code": hash_code(Path(stages.__path__[0]), _CODE),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        names = [digest.hexdigest()]
        for block in self.blocks:
            digest.update(repr(block).encode())
            for key, tensor in block.state_dict().items():
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
            names.append(digest.hexdigest())
        return [name[:40] for name in names]


@dataclass
class Kept:
    """Rows on disk, read through a memory map on demand, even after another process has removed the file.

    `rows`: SHA-256 of an image -> the tensor of a file and the row in it; `paths`: the files.
    """

    rows: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    paths: set[Path] = field(default_factory=set)

    def missing(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return those of some images that have no row, one entry per SHA-256."""
        return list({entry.sha256: entry for entry in entries if entry.sha256 not in self.rows}.values())

    def look_up(self, folder: Path, entries: Iterable[Entry]) -> None:
        """Add the rows of missing images that a folder holds."""
        other = find(folder, self.missing(entries))
        self.rows |= other.rows
        self.paths |= other.paths

    def gather(self, entries: Iterable[Entry]) -> Tensor:
        """Return the activations of one or more images that have rows, (n, ...)."""
        return torch.stack([tensor[row] for tensor, row in (self.rows[entry.sha256] for entry in entries)])


def keep(prefix: FrozenPrefix, wanted: Mapping[int, list[Entry]], max_gigabytes: float) -> dict[int, Kept]:
    """Look up activations at some depths; compute the missing ones in one pass over the images, and store them.

    If the missing rows of a depth do not all fit, none of them is stored: a message says that they are computed at each
    use. Each rank computes a part, and all ranks find all rows.

    Args:
        prefix: the blocks.
        wanted: number of blocks -> images; depths that come first get space first.
        max_gigabytes: limit of the whole cache.

    Returns:
        Number of blocks -> the rows that are stored.

    Raises:
        StageError: an image is gone or changed since the index was made, or machines have different caches.
    """
    ranks.require_one_folder(cache.activations_folder(), cache.VARIABLE)
    names = prefix.names()
    folders = {cut: cache.activations_folder() / names[cut] for cut in wanted}
    found = {cut: Kept() for cut in wanted}

    def look_up() -> None:
        for cut, entries in wanted.items():
            found[cut].look_up(folders[cut], entries)

    look_up()
    if not ranks.agree(any(found[cut].missing(entries) for cut, entries in wanted.items())):
        return found
    with ExitStack() as stack:
        planned: dict[int, list[Entry]] = {}
        problem: OSError | None = None
        try:
            if ranks.rank() == 0:
                # In the same order in all processes, against deadlocks.
                for folder in sorted(folders.values()):
                    stack.enter_context(cache.one_at_a_time(folder))
                look_up()
                planned, problem = _plan(prefix, wanted, found, max_gigabytes)
        except OSError as error:
            problem = error
        planned, problem = ranks.agree((planned, problem))
        try:
            _compute(prefix, planned, folders)
        except OSError as error:
            problem = error
        problem = next((error for error in ranks.gather(problem) if error is not None), None)
    look_up()
    for cut, entries in wanted.items():
        if missing := found[cut].missing(entries):
            why = cache.explain(problem) if problem is not None else "another process removed them"
            print(f"activations of {len(missing):,} images are not stored, but computed at each use: {why}", flush=True)
    return found


def _plan(
    prefix: FrozenPrefix, wanted: Mapping[int, list[Entry]], found: Mapping[int, Kept], max_gigabytes: float
) -> tuple[dict[int, list[Entry]], OSError | None]:
    """Make room; return which images to compute at each depth, and why some are left out."""
    planned: dict[int, list[Entry]] = {}
    problem: OSError | None = None
    crop = prefix.preprocessing.crop
    rows = prefix.forward(torch.zeros(1, 3, crop, crop), list(wanted))
    spare = {path for kept in found.values() for path in kept.paths}
    needed = 0
    for (cut, entries), row in zip(wanted.items(), rows, strict=True):
        missing = found[cut].missing(entries)
        size = len(missing) * (row.nbytes + ROW_OVERHEAD)
        try:
            cache.make_room(needed + size, max_gigabytes, spare)
        except OSError as error:
            problem, missing, size = error, [], 0
        planned[cut], needed = missing, needed + size
    return planned, problem


def _compute(prefix: FrozenPrefix, wanted: dict[int, list[Entry]], folders: dict[int, Path]) -> None:
    """Compute and write this rank's part of the activations, in one pass; raises OSError."""
    started = time.monotonic()
    every = list({entry.sha256: entry for own in wanted.values() for entry in own}.values())
    entries = prefix.share.of(every)
    writers = {cut: Writer(folders[cut], {entry.sha256 for entry in own}) for cut, own in wanted.items() if own}
    if not entries:
        return
    with tqdm(total=len(entries), desc="activations", unit=" images", disable=None) as progress:
        first = 0
        for images, _ in prefix.read(entries, BATCH, "none", Order(len(entries))):
            batch = entries[first : (first := first + len(images))]
            for writer, rows in zip(writers.values(), prefix.forward(images, list(writers)), strict=True):
                writer.add(batch, rows.cpu())
            progress.update(len(images))
    for writer in writers.values():
        writer.flush()
    if not sys.stderr.isatty():
        speed = len(every) / (time.monotonic() - started)
        print(f"activations: {len(every):,} images, {speed:.0f} images/s", flush=True)


class Writer:
    """Collects the rows of `wanted` images, SHA-256 of their files, and writes them into a folder."""

    def __init__(self, folder: Path, wanted: set[str]) -> None:
        self.folder, self.wanted = folder, wanted
        self.rows: dict[str, Tensor] = {}

    def add(self, entries: list[Entry], rows: Tensor) -> None:
        """Take the rows of some images, (n, ...), on the CPU; raises OSError."""
        self.rows |= {
            entry.sha256: row for entry, row in zip(entries, rows, strict=True) if entry.sha256 in self.wanted
        }
        if len(self.rows) * rows[0].nbytes >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows; raises OSError."""
        if not self.rows:
            return
        tensor = torch.stack(list(self.rows.values()))
        about = {"images": list(self.rows), "crc32": [_checksum(row) for row in tensor]}
        name = hashlib.sha256("".join(self.rows).encode()).hexdigest()[:40]
        content = safetensors.torch.save({_KEY: tensor}, {_KEY: json.dumps(about)})
        write_bytes(self.folder / f"{name}.safetensors", content)
        self.rows = {}


def find(folder: Path, entries: Iterable[Entry]) -> Kept:
    """Return the rows of some images in a folder; a damaged file is removed, with a message."""
    kept, hashes = Kept(), {entry.sha256 for entry in entries}
    for path in sorted(folder.glob("*.safetensors")) if hashes else []:
        try:
            with safe_open(path, framework="pt") as content:
                about = json.loads(content.metadata()[_KEY])
                tensor = content.get_tensor(_KEY)  # a memory map, read on use
            rows: dict[str, tuple[Tensor, int]] = {}
            for row, (sha256, checksum) in enumerate(zip(about["images"], about["crc32"], strict=True)):
                if sha256 in hashes and sha256 not in kept.rows:
                    if _checksum(tensor[row]) != checksum:
                        raise ValueError("a checksum is wrong")
                    rows[sha256] = tensor, row
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            print(f"{path}: damaged ({error}); its activations are computed again", flush=True)
            with suppress(OSError):
                path.unlink()
        except OSError:  # removed by another process just now, or not readable
            continue
        else:
            if rows:
                kept.rows |= rows
                kept.paths.add(path)
                with suppress(OSError):  # fails on a read-only disk
                    os.utime(path)
    return kept


def _checksum(row: Tensor) -> int:
    return zlib.crc32(row.contiguous().flatten().view(torch.uint8).numpy().data)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
