"""Several processes, called ranks, that train one network: torch.distributed, launched by torchrun.

A stage that needs several ranks launches itself once per rank; torchrun's environment variables (`PET_NNODES` and so
on) make them span machines. A process started by torchrun joins the others. With one process, nothing here has an
effect.
"""

import ctypes
import json
import logging
import math
import os
import signal
import sys
import tempfile
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stages.common.cli import LOST, StageError, end_with_the_others
from stages.common.files import sha256_of
from stages.common.machine import usable_cores
from stages.common.params import Params

Item = TypeVar("Item")

# The others notice at once when a rank ends, since its connections close. This is for ranks that wait while another one
# computes.
_PATIENCE = timedelta(days=1)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Share:
    """The samples of one rank: every `count`-th position of an order, beginning at `rank`."""

    rank: int = 0
    count: int = 1

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's items, in order."""
        return list(items[self.rank :: self.count])

    def places(self, items: int, batch_size: int) -> list[range]:
        """Return this rank's positions within each batch."""
        starts = range(0, items, batch_size)
        return [range((self.rank - first) % self.count, min(batch_size, items - first), self.count) for first in starts]


def start_processes(processes: int | str, device: str) -> None:
    """Become one of several ranks if `processes` asks for them; otherwise do nothing.

    A process not started by torchrun launches the ranks, waits for them and exits: it never returns. Raises StageError
    if there are too few GPUs, or other machines cannot be reached.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _join(device)
        return
    number = count_processes(processes, device)
    if number > 1 or os.environ.get("PET_NNODES", "1") != "1":
        _launch(number)


def count_processes(processes: int | str, device: str) -> int:
    """Turn `params.yaml`'s `processes` into a number; `auto`: one per GPU, or one."""
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if processes == "auto":
        return max(1, gpus)
    assert isinstance(processes, int)
    on_cpu = device == "cpu" or (device == "auto" and not gpus and not torch.backends.mps.is_available())
    if processes > 1 and not on_cpu and processes > gpus:
        there = f"this machine has {gpus}" if device in ("auto", "cuda") else f"device: {device} is one"
        raise StageError(f"processes: {processes} need a GPU each, but {there}; use fewer, or device: cpu")
    return processes


def joined() -> bool:
    """Whether torchrun has started this process, possibly as the only rank."""
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """Return the number of ranks on all machines."""
    return dist.get_world_size() if joined() else 1


def rank() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if joined() else 0


def local_rank() -> int | None:
    """Return the number of this rank on its machine; `None` without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if joined() else None


def share() -> Share:
    """Return the share of this rank."""
    return Share(rank(), count())


def writes_outputs() -> bool:
    """Whether this rank writes the outputs of a stage: the first one on each machine, in that machine's clone."""
    return not local_rank()


def require_one_folder(folder: Path, name: str) -> None:
    """Raise StageError if machines see different files in a folder; `name`: the setting for its path."""
    if len(set(gather(os.environ.get("GROUP_RANK")))) == 1:
        return
    marker = folder / agree(f".{uuid.uuid4().hex}")
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    wait()
    seen = gather(marker.exists())
    if rank() == 0:
        marker.unlink()
    if not all(seen):
        raise StageError(f"{name}: the machines do not see the same files in {folder}; set it to a folder they share")


def wait() -> None:
    """Wait for all ranks."""
    gather(None)


def gather(value: Item) -> list[Item]:
    """Return the values of all ranks, in order."""
    if not joined():
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def agree(value: Item) -> Item:
    """Return the first rank's value on all ranks."""
    return gather(value)[0]


def add_up(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    if joined():
        values = values.clone()
        dist.all_reduce(values)
    return values


def require_same(params: Params, files: Sequence[Path]) -> None:
    """Raise StageError if ranks have different parameters or files, which each reads on its own machine."""
    if not joined():
        return
    own = params.model_dump(mode="json", exclude={"device", "workers", "processes", "cache", "data"})
    about = {"params.yaml": json.dumps(own), **{str(path): sha256_of(path) for path in files}}
    differ = [name for name, value in about.items() if agree(value) != value]
    if names := [name for names in gather(differ) for name in names]:
        raise StageError(f"{names[0]}: not the same on all machines; start from the same commit with the same images")


def leave() -> None:
    """Leave the process group; ranks that write no outputs exit here, with success."""
    if not joined():
        return
    stays = writes_outputs()
    wait()
    dist.destroy_process_group()
    if not stays:
        sys.exit(0)


def _join(device: str) -> None:
    if os.environ.get("RANK") != "0":
        _be_quiet()
    if sys.platform == "linux":  # ranks end with a launcher that is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    backend = "gloo"
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    end_with_the_others()
    dist.init_process_group(backend, timeout=_PATIENCE)


def _be_quiet() -> None:
    """Silence all but errors: the first rank reports progress."""
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (to the end of the process)
    sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)
    warnings.simplefilter("ignore")


class _NoTerminal(TextIOWrapper):
    """A stream without progress bars."""

    def isatty(self) -> bool:
        return False


def _launch(number: int) -> NoReturn:
    """Launch this command `number` times with torchrun, and exit as the ranks do."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // number)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise it warns of each address without a name
    # torchrun reports a failure on a page; one line follows below.
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="dvc-finetune-") as errors:
        options = [f"--nproc-per-node={number}", f"--log-dir={errors}", "--no-python"]
        try:
            arguments = torchrun.parse_args([*options, sys.executable])  # type: ignore[no-untyped-call]
            # Not through its parser, which would read a stage's --start as an abbreviated option of its own.
            arguments.training_script_args = sys.orig_argv[1:]
            torchrun.run(arguments)  # type: ignore[no-untyped-call]
        except SignalException:
            raise KeyboardInterrupt from None
        except ChildFailedError as error:
            failures = error.failures
        except (RendezvousError, dist.DistError) as error:
            where = os.environ.get("PET_RDZV_ENDPOINT") or os.environ.get("PET_MASTER_ADDR") or "this machine"
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise StageError(f"the other machines cannot be reached through {where}: {first}") from error
        else:
            sys.exit(0)
    raise StageError(_explain(failures))


def _explain(failures: dict[int, Any]) -> str:
    """Return one line for the failure that came first.

    Ranks that fail because of another one lose their connection, or torchrun ends them by SIGTERM.
    """
    causes = {
        rank: failure for rank, failure in failures.items() if failure.exitcode not in (LOST, -signal.SIGTERM)
    } or failures
    rank, failure = min(causes.items(), key=lambda item: (item[1].error_file_data.get("timestamp", math.inf), item[0]))
    if failure.exitcode < 0 and "timestamp" not in failure.error_file_data:
        name = signal.Signals(-failure.exitcode).name
        hint = ", probably out of memory; use fewer, or a smaller batch_size" if name == "SIGKILL" else ""
        return f"processes: number {rank} was ended by {name}{hint}"
    message = failure.error_file_data.get("message")
    return str(message) if message != "<NONE>" else f"processes: number {rank} failed, for the reason above"
