"""The user's cache: files that can be recomputed, shared by all experiments and processes.

It lies outside the repository, of which `dvc exp run --queue` makes an empty copy for each experiment. When space runs
out, the least recently used files are removed; a process that has one open still reads it through its memory map.
`python -m stages.training.cache` prints the cache's size.
"""

import argparse
import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from stages.common.cli import describe, run

VARIABLE = "DVC_FINETUNE_CACHE"
_LOCK = ".lock"


def cache_folder() -> Path:
    """Return `DVC_FINETUNE_CACHE` if it is set, otherwise the system's folder for a user's caches."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).absolute() if chosen else platformdirs.user_cache_path("dvc-finetune", appauthor=False)


def activations_folder() -> Path:
    """Return the part of the cache for activations."""
    return cache_folder() / "activations"


def states_folder() -> Path:
    """Return the part of the cache for the states of stopped runs."""
    return cache_folder() / "states"


def make_room(needed: int, max_gigabytes: float, spare: Collection[Path] = ()) -> None:
    """Remove the least recently used files until `needed` more bytes fit; none if they cannot.

    `max_gigabytes`: limit of the whole cache, 10^9 bytes each; `spare`: files to leave. Raises OSError if the bytes fit
    neither under the limit nor on the disk, or the cache cannot be used.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    files = list(_files())
    removable = sorted((status.st_mtime, path, status.st_size) for path, status in files if path not in spare)
    limit = int(max_gigabytes * 1e9) - sum(status.st_size for _, status in files)
    disk = shutil.disk_usage(cache_folder()).free
    free = sum(size for _, _, size in removable)
    if needed > min(limit, disk) + free:
        where = "under cache.max_gigabytes" if limit <= disk else "on the disk"
        raise OSError(errno.ENOSPC, f"no room for {needed / 1e9:.2f} GB {where}", str(cache_folder()))
    lacking = needed - min(limit, disk)
    for _, path, size in removable:
        if lacking <= 0:
            break
        with suppress(OSError):  # open elsewhere, on Windows
            path.unlink()
            lacking -= size


def size() -> tuple[int, int]:
    """Return the number of files and their bytes."""
    sizes = [status.st_size for _, status in _files()]
    return len(sizes), sum(sizes)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder that only one process at a time may fill; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(_LOCK))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("waiting for another process that computes the same activations", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def explain(error: OSError) -> str:
    """Return a few words for why the cache cannot be written."""
    return describe(error).partition(";")[0]


def _files() -> Iterator[tuple[Path, os.stat_result]]:
    for path in cache_folder().rglob("*"):
        with suppress(OSError):  # another process removed it
            if path.is_file() and path.suffix != _LOCK:
                yield path, path.stat()


def main() -> None:
    """Print how large the cache is, or empty it."""
    parser = argparse.ArgumentParser(prog="python -m stages.training.cache", description=main.__doc__)
    parser.add_argument("--clear", action="store_true", help="remove all that it has")
    if parser.parse_args().clear:
        before = size()[1]
        for path, _ in list(_files()):
            with suppress(OSError):  # open elsewhere, on Windows
                path.unlink()
        print(f"{(before - size()[1]) / 1e9:.2f} GB removed")
    files, total = size()
    print(f"{cache_folder()}: {files} files, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    run(main)
