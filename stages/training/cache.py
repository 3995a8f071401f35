"""The user's cache: files that can be computed again, shared by all experiments and processes.

Not in the repository, where each experiment of `dvc exp run --queue` starts with an empty copy. Files are removed the
least recently used first, and none of a folder that a process uses: it holds a shared `flock`, one a folder, which ends
with the process however that ends. `python -m stages.training.cache` prints the cache's size.
"""

import argparse
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from stages.common.cli import describe, run

VARIABLE = "DVC_FINETUNE_CACHE"
_LOCK = ".lock"


def cache_folder() -> Path:
    """Return the folder: `DVC_FINETUNE_CACHE` if that is set, else where the system keeps a user's caches."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).absolute() if chosen else platformdirs.user_cache_path("dvc-finetune", appauthor=False)


def activations_folder() -> Path:
    """Return the part of the cache for activations."""
    return cache_folder() / "activations"


def states_folder() -> Path:
    """Return the part of the cache for the states of stopped runs."""
    return cache_folder() / "states"


class FullError(OSError):
    """There is no room for what is to be written."""


class Hold:
    """A mark that a folder of the cache is in use, until it is closed, or nothing refers to it any more.

    Raises:
        OSError: the folder cannot be marked.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = os.open(_lock_file(folder, "used"), os.O_RDWR | os.O_CREAT)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Let other processes remove the folder's files."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Not set where it could not be opened.
        if hasattr(self, "_descriptor"):
            self.close()


@dataclass(frozen=True)
class Room:
    """How much can be written, in bytes: under the cache's limit and on the disk, once files are removed for it."""

    limit: int
    disk: int

    def why_not(self, needed: int) -> FullError | None:
        """Return an error that says why `needed` bytes do not fit, `None` if they do."""
        if needed <= min(self.limit, self.disk):
            return None
        where = "under cache.max_gigabytes" if self.limit <= self.disk else "on the disk"
        return FullError(errno.ENOSPC, f"no room for {needed / 1e9:.2f} GB {where}", str(cache_folder()))


def find_room(removable: Collection[Path], max_gigabytes: float, spare: Collection[Path] = ()) -> Room:
    """Find out how much can be written, and remove nothing.

    Args:
        removable: parts of the cache whose files may go.
        max_gigabytes: for the whole cache, in units of 10^9 bytes.
        spare: files that may not go.

    Raises:
        OSError: the cache cannot be used.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    total = sum(status.st_size for _, status in _files(cache_folder()))
    free = sum(status.st_size for _, status in _removable(removable, spare))
    return Room(int(max_gigabytes * 1e9) - total + free, shutil.disk_usage(cache_folder()).free + free)


def make_room(needed: int, removable: Collection[Path], max_gigabytes: float, spare: Collection[Path] = ()) -> None:
    """Remove files, the least recently used first, until `needed` bytes more fit; none if they cannot.

    Args:
        needed: bytes.
        removable: as for `find_room`, like the rest.
        max_gigabytes: of the whole cache.
        spare: files that may not go.

    Raises:
        FullError: they do not fit beside what is in use, or not on the disk.
        OSError: the cache cannot be used.
    """
    if (problem := find_room(removable, max_gigabytes, spare).why_not(needed)) is not None:
        raise problem
    files = sorted(_removable(removable, spare), key=lambda file: file[1].st_mtime)
    now = find_room((), max_gigabytes)
    lacking = needed - min(now.limit, now.disk)
    for path, status in files:
        if lacking <= 0:
            return
        if _remove_unless_used(path):
            lacking -= status.st_size
    if lacking > 0:  # a process began to use some just now
        raise FullError(errno.ENOSPC, f"no room for {needed / 1e9:.2f} GB", str(cache_folder()))


def size() -> tuple[int, int]:
    """Return the number of files and their bytes."""
    sizes = [status.st_size for _, status in _files(cache_folder())]
    return len(sizes), sum(sizes)


def clear() -> int:
    """Remove all that is not in use, and return the bytes that became free."""
    return sum(status.st_size for path, status in list(_files(cache_folder())) if _remove_unless_used(path))


@contextmanager
def one_at_a_time(folder: Path, while_waiting: str) -> Iterator[None]:
    """Hold a lock between processes.

    Args:
        folder: whose content only one process at a time may make.
        while_waiting: a line to print if another process holds it.

    Raises:
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(folder, "made").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(while_waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def explain(error: OSError) -> str:
    """Return a few words for why the cache cannot be written."""
    return describe(error).partition(";")[0]


def _lock_file(folder: Path, purpose: str) -> Path:
    return folder.with_name(f"{folder.name}.{purpose}{_LOCK}")


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.rglob("*"):
        with suppress(OSError):  # another process removed it
            if path.is_file() and path.suffix != _LOCK:
                yield path, path.stat()


def _removable(parts: Collection[Path], spare: Collection[Path]) -> list[tuple[Path, os.stat_result]]:
    files = [file for part in parts for file in _files(part) if file[0] not in spare]
    unused = {folder for folder in {path.parent for path, _ in files} if _is_unused(folder)}
    return [file for file in files if file[0].parent in unused]


def _is_unused(folder: Path) -> bool:
    with suppress(OSError), _unused(folder):
        return True
    return False


@contextmanager
def _unused(folder: Path) -> Iterator[None]:
    """Keep other processes from using a folder; a `BlockingIOError` if one does."""
    with _lock_file(folder, "used").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _remove_unless_used(path: Path) -> bool:
    with suppress(OSError), _unused(path.parent):
        path.unlink()
        return True
    return False


def main() -> None:
    """Print how large the cache is, or empty it."""
    parser = argparse.ArgumentParser(prog="python -m stages.training.cache", description=main.__doc__)
    parser.add_argument("--clear", action="store_true", help="remove all that no process uses")
    if parser.parse_args().clear:
        print(f"{clear() / 1e9:.2f} GB removed")
    files, total = size()
    print(f"{cache_folder()}: {files} files, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    run(main)
