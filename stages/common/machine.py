"""This machine: usable cores, memory, and how freed memory is reused."""

import ctypes
import os
import sys
import tempfile
from pathlib import Path

from stages.common.cli import StageError

# Memory limits of a container, control groups version 2 and 1 (https://docs.kernel.org/admin-guide/cgroup-v2.html).
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

# More decoders than this are faster than any network.
_MOST = 16
# Decoding processes send images through sockets in the temporary folder. A socket's path has at most 103 bytes (macOS;
# Linux: 107); with a longer one, torch's loader hangs.
_LONGEST_TEMPORARY_FOLDER = 103 - len("/pymp-12345678/listener-12345678")


def resolve_workers(workers: int | str) -> int:
    """Turn `params.yaml`'s `workers` into a number; `auto`: one per usable core, at most 16, over all ranks.

    Raises StageError if the path of the temporary folder is too long for sockets.
    """
    if workers == 0:
        return 0
    temporary = tempfile.gettempdir()
    if len(os.fsencode(temporary)) > _LONGEST_TEMPORARY_FOLDER:
        raise StageError(
            f"workers: the path of the folder for temporary files, {temporary}, is too long for several processes; "
            "set TMPDIR to a shorter one, or workers to 0"
        )
    if isinstance(workers, int):
        return workers
    # torchrun sets the number of ranks on this machine (stages.common.ranks).
    return max(1, min(usable_cores(), _MOST) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> float:
    """Return the memory of this machine, or of the container if that is less, in bytes."""
    if not hasattr(os, "sysconf"):  # Windows
        return float("inf")
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *map(_read_limit, _LIMITS))


def require_memory(images: int, bytes_each: float, image_size: int) -> None:
    """Raise StageError if a batch does not fit into memory; Linux would kill the process."""
    needed, there = images * bytes_each, total_memory()
    if needed > there:
        raise StageError(
            f"model.image_size: {images:,} images of {image_size:,} px at a time need {needed / 1e9:,.1f} GB, of "
            f"{there / 1e9:,.1f} GB here; lower it"
        )


def reuse_freed_memory() -> None:
    """Let glibc keep freed blocks, since a network allocates the same ones at each step.

    By default glibc returns blocks above 32 MiB to the kernel, and faulting them in again took half of the time of
    predicting 128 images and a third of a flatten head's step (its gradient has 94 MB). By mallopt(3), no block is
    mapped on its own (M_MMAP_MAX), and the heap does not shrink (M_TRIM_THRESHOLD).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_mmap_max, m_trim_threshold = -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def _read_limit(file: Path) -> float:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return float("inf")
