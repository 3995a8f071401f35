"""The user's cache: files that can be computed again, shared by all experiments and processes.

Not in the repository, where each experiment of `dvc exp run --queue` starts with an empty copy. Files are removed the
least recently used first, and never while a process uses them: it holds a shared `flock`, which ends with the process
however that ends. `python -m stages.training.cache` prints its size.
"""

import argparse
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import platformdirs

from stages.common.stage import describe, run

VARIABLE = "DVC_FINETUNE_CACHE"
_LOCK = ".lock"


def cache_folder() -> Path:
    """Return the folder: `DVC_FINETUNE_CACHE` if that is set, else where the system keeps a user's caches."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).absolute() if chosen else platformdirs.user_cache_path("dvc-finetune", appauthor=False)


class FullError(OSError):
    """There is no room for what is to be written."""


def open_used(path: Path) -> BinaryIO:
    """Mark a file as used just now, and as in use until the returned file is closed.

    Raises:
        OSError: it is not there.
    """
    file = path.open("rb")
    with suppress(OSError):  # on a read-only disk nothing is removed, so neither mark is needed
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(path)
    return file


def make_room(needed: int, max_gigabytes: float) -> None:
    """Remove files until `needed` bytes more fit.

    Args:
        needed: bytes.
        max_gigabytes: for the whole cache, in units of 10^9 bytes.

    Raises:
        FullError: they do not fit beside what is in use, or not on the disk.
        OSError: the folder cannot be used.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(_files(), key=lambda file: file[1].st_mtime)
    excess = sum(status.st_size for _, status in files) + needed - int(max_gigabytes * 1e9)
    for path, status in files:
        if excess <= 0:
            break
        if _remove_unless_used(path):
            excess -= status.st_size
    if excess > 0:
        raise FullError(errno.ENOSPC, f"no room for {needed / 1e9:.2f} GB under cache.max_gigabytes", str(folder))
    if shutil.disk_usage(folder).free < needed:
        raise FullError(errno.ENOSPC, f"no room for {needed / 1e9:.2f} GB on the disk", str(folder))


def size() -> tuple[int, int]:
    """Return the number of files and their bytes."""
    sizes = [status.st_size for _, status in _files()]
    return len(sizes), sum(sizes)


def clear() -> int:
    """Remove all that is not in use, and return the bytes that became free."""
    return sum(status.st_size for path, status in list(_files()) if _remove_unless_used(path))


@contextmanager
def one_at_a_time(path: Path, while_waiting: str) -> Iterator[None]:
    """Hold a lock between processes, a file beside `path`.

    Args:
        path: what the lock is for.
        while_waiting: a line to print if another process holds it.

    Raises:
        OSError: it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(while_waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def explain(error: OSError) -> str:
    """Return a few words for why the cache cannot be written."""
    return describe(error).partition(";")[0]


def _files() -> Iterator[tuple[Path, os.stat_result]]:
    for path in cache_folder().rglob("*"):
        with suppress(OSError):  # another process removed it
            if path.is_file() and path.suffix != _LOCK:
                yield path, path.stat()


def _remove_unless_used(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
