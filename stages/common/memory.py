"""Memory: how much this machine, or the container around this process, has; and that it is used again."""

import ctypes
import os
import sys
from pathlib import Path

from stages.common.cli import StageError

# Limits of a container: control groups version 2 and 1 (https://docs.kernel.org/admin-guide/cgroup-v2.html).
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total_memory() -> float:
    """Return the bytes of memory that all programs share here, or of the container where that is less."""
    if not hasattr(os, "sysconf"):  # Windows
        return float("inf")
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *map(_read_limit, _LIMITS))


def require_memory(images: int, bytes_each: float, image_size: int) -> None:
    """Refuse what cannot be done here: Linux would end the process without a word.

    Args:
        images: that are in work at one time.
        bytes_each: that each takes at least.
        image_size: height and width of the images, pixels.

    Raises:
        StageError: together they take more than there is.
    """
    needed, there = images * bytes_each, total_memory()
    if needed > there:
        raise StageError(
            f"model.image_size: {images:,} images of {image_size:,} px at a time need {needed / 1e9:,.1f} GB, of "
            f"{there / 1e9:,.1f} GB here; lower it"
        )


def reuse_freed_memory() -> None:
    """Let the C library keep freed blocks, where it is glibc: a network asks for the same ones at each step.

    By default glibc gives blocks above 32 MiB back to the kernel, and they are faulted in again, page by page: half of
    the time of predicting 128 images, a third of a flatten head's step (its gradient has 94 MB). mallopt(3): no block
    is mapped on its own (M_MMAP_MAX), and the heap does not shrink (M_TRIM_THRESHOLD).
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
