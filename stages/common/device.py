"""Where to compute, and in which precision."""

import torch

from stages.common import ranks
from stages.common.cli import StageError
from stages.common.params import Precision


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the dtype of activations; parameters and their updates are float32 in any case."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context in which a network's `forward` runs; it changes nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def resolve_device(device: str) -> torch.device:
    """Turn `params.yaml`'s `device` into a torch device; `auto` is the first of cuda, mps and cpu that is there.

    Each rank has a GPU of its own.

    Raises:
        StageError: the device asked for is not there.
    """
    if device == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        device = "cuda" if cuda else "mps" if mps else "cpu"
    if device == "cuda" and (number := ranks.local_rank()) is not None:
        device = f"cuda:{number}"
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise StageError(
            f"device: {device} is not on this machine, which has {torch.cuda.device_count()} CUDA devices; "
            "use auto or cpu"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise StageError("device: mps is not on this machine; use auto or cpu")
    return chosen
