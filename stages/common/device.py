"""Where to compute, and how to get the same numbers twice."""

import ctypes
import os
from enum import Enum

import torch

from stages.common.command import StageError


class Precision(Enum):
    """In what the network computes; parameters and their updates are float32 in any case."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return torch.bfloat16 if self is Precision.BFLOAT16 else torch.float32


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context in which a network's `forward` runs; it changes nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is Precision.BFLOAT16)


def reuse_freed_memory() -> None:
    """Let the C library keep freed blocks, where it is glibc. For training, which asks for the same ones every step.

    By default glibc gives blocks above 32 MiB back to the kernel, and the gradient of the flatten head (94 MB) is
    faulted in again, page by page, at each step: a third of its time. mallopt(3): no block is mapped on its own
    (M_MMAP_MAX), and the heap does not shrink (M_TRIM_THRESHOLD).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_mmap_max, m_trim_threshold = -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def resolve_device(device: str) -> torch.device:
    """Turn `params.yaml`'s `device` into a torch device; `auto` is the first of cuda, mps and cpu that is there.

    Raises:
        StageError: the device asked for is not there.
    """
    if device == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise StageError(
            f"device: {device} is not on this machine, which has {torch.cuda.device_count()} CUDA devices; "
            "use auto or cpu"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise StageError("device: mps is not on this machine; use auto or cpu")
    return chosen


def make_deterministic(seed: int) -> None:
    """Seed torch and choose its deterministic algorithms; it warns where an operation has none."""
    # cuBLAS asks for this before its first call: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(seed)
