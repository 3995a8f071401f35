"""Activations on disk, in the user's cache: files of rows, each row found by the SHA-256 of its picture's file."""

import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.common.files import write_bytes
from stages.images.index import Entry
from stages.training import cache

_KEY = "activations"
_FILE_BYTES = 2**26
# What a row takes in a file beside its values: its picture and its checksum, as JSON, and a share of the header.
ROW_OVERHEAD = 100
FILE_OVERHEAD = 300


@dataclass
class Kept:
    """Activations on disk: each row is read, through a memory map, when it is asked for.

    `rows`: SHA-256 -> a file's tensor, and the row in it; `paths`: the files; `holds` are open while in use, so that no
    process removes them. What was removed all the same, while nothing was held, can still be read.
    """

    rows: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    paths: set[Path] = field(default_factory=set)
    holds: list[cache.Hold] = field(default_factory=list)

    def missing(self, entries: Iterable[Entry]) -> dict[str, Entry]:
        """Return those of some pictures that are not here, by the SHA-256 of their files."""
        return {entry.sha256: entry for entry in entries if entry.sha256 not in self.rows}

    def add(self, other: "Kept") -> None:
        """Take over what another one holds."""
        self.rows |= other.rows
        self.paths |= other.paths
        self.holds += other.holds

    def hold(self, folder: Path) -> None:
        """Keep processes from removing a folder's files; not where it cannot be written: there nothing is removed."""
        with suppress(OSError):
            self.holds.append(cache.Hold(folder))

    def release(self) -> None:
        """Let other processes remove the files."""
        for hold in self.holds:
            hold.close()
        self.holds = []

    def row(self, entry: Entry) -> Tensor:
        """Return the activations of a picture that is here."""
        tensor, row = self.rows[entry.sha256]
        return tensor[row]

    def gather(self, entries: Iterable[Entry]) -> Tensor:
        """Return the activations of some pictures, at least one: (n, ...)."""
        return torch.stack([self.row(entry) for entry in entries])


def find(folder: Path, hashes: Collection[str]) -> Kept:
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


class Writer:
    """Collects rows and writes them into a folder, a file at a time.

    The folder is marked as in use until the writer is closed.

    Args:
        folder: where.
        wanted: the pictures whose rows are to be written, by the SHA-256 of their files.

    Raises:
        OSError: the folder cannot be used.
    """

    def __init__(self, folder: Path, wanted: Collection[str]) -> None:
        self.folder, self.wanted = folder, wanted
        self._hold = cache.Hold(folder)  # else another process could remove what was just written
        self.hashes: list[str] = []
        self.rows: list[Tensor] = []

    def add(self, hashes: list[str], activations: Tensor) -> None:
        """Take the rows of some pictures, (n, ...), on the CPU; those not wanted are left out."""
        for sha256, row in zip(hashes, activations, strict=True):
            if sha256 in self.wanted:
                self.hashes.append(sha256)
                self.rows.append(row)
        if self.rows and len(self.rows) * self.rows[0].nbytes >= _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was not written yet.

        Raises:
            OSError: it cannot be written.
        """
        if not self.rows:
            return
        tensor = torch.stack(self.rows)
        about = {"pictures": self.hashes, "crc32": [_checksum(row) for row in tensor]}
        name = hashlib.sha256("".join(self.hashes).encode()).hexdigest()[:40]
        content = safetensors.torch.save({_KEY: tensor}, {_KEY: json.dumps(about)})
        write_bytes(self.folder / f"{name}.safetensors", content)
        self.hashes, self.rows = [], []

    def close(self) -> None:
        """Let other processes remove the files."""
        self._hold.close()


def _checksum(row: Tensor) -> int:
    return zlib.crc32(row.contiguous().flatten().view(torch.uint8).numpy().data)


def _add(path: Path, hashes: Collection[str], kept: Kept) -> None:
    with safe_open(path, framework="pt") as content:
        about = json.loads(content.metadata()[_KEY])
        tensor = content.get_tensor(_KEY)  # a memory map: its bytes are read when they are used
    rows: dict[str, tuple[Tensor, int]] = {}
    for row, (sha256, checksum) in enumerate(zip(about["pictures"], about["crc32"], strict=True)):
        if sha256 in hashes and sha256 not in kept.rows:
            if _checksum(tensor[row]) != checksum:
                raise ValueError("a checksum is wrong")
            rows[sha256] = tensor, row
    if rows:
        kept.rows |= rows
        kept.paths.add(path)
        with suppress(OSError):  # not on a read-only disk
            os.utime(path)
