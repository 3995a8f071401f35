"""Where to compute, in which precision, and how to get the same results twice."""

import os

import numpy as np
import torch
from torch import Generator, Tensor

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
    """Turn `params.yaml`'s `device` into a torch device; `auto`: the first available of cuda, mps and cpu.

    Each rank has its own GPU. Raises StageError if the device is not available.
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


def generator_for(*numbers: int) -> Generator:
    """Return a CPU generator that depends on a seed and on further numbers, such as the epoch.

    By a sum, seed 1, epoch 2 and seed 2, epoch 1 would have the same generator; a shift would be lost, since torch's
    CPU generator uses only the lower 32 bits of its seed (`at::mt19937`). numpy's SeedSequence mixes them
    (https://numpy.org/doc/stable/reference/random/bit_generators/generated/numpy.random.SeedSequence.html).
    """
    return Generator().manual_seed(seed_for(*numbers))


def seed_for(*numbers: int) -> int:
    """Return the seed of `generator_for`."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def make_deterministic(seed: int) -> None:
    """Seed torch and use its deterministic algorithms; it warns of operations that have none."""
    # cuBLAS needs this before its first call: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The same as torch.use_deterministic_algorithms(True, warn_only=True), which would load torch's compiler.
    torch.set_deterministic_debug_mode("warn")
    # Filling new tensors with NaN, to expose reads of uninitialized memory, takes a tenth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # By default, NVIDIA's GPUs since Ampere compute float32 convolutions in TF32, with 10 of 23 mantissa bits.
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's generators: the CPU's, and the GPU's if that is `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put torch's generators into a state that `random_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state["mps"].cpu())
