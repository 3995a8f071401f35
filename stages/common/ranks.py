"""Several processes that train one network: torch.distributed, started by torch's own launcher, torchrun.

A stage that is to run as several processes starts itself anew, once for each; torchrun's environment variables
(`PET_NNODES` and so on) make them span several machines. What torchrun has started, by this or by hand, joins the
others. Where there is one process, everything here does nothing.
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

# A process that ends closes its connections, which the others notice at once. This is for those that compute for long
# while others wait.
_PATIENCE = timedelta(days=1)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Share:
    """The samples that one rank handles: every `count`-th place of an order, from the place `rank` on."""

    rank: int = 0
    count: int = 1

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's part of items in order."""
        return list(items[self.rank :: self.count])

    def places(self, items: int, batch_size: int) -> list[range]:
        """Return this rank's places in each batch, counted within it."""
        starts = range(0, items, batch_size)
        return [range((self.rank - first) % self.count, min(batch_size, items - first), self.count) for first in starts]


def start_processes(processes: int | str, device: str) -> None:
    """Become one of several processes of this machine, if there are to be several; else do nothing.

    A process that torchrun has not started starts them, waits for their end and ends: it never returns. Raises
    StageError where there are not that many GPUs, or the others cannot be reached.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _join(device)
        return
    number = count_processes(processes, device)
    if number > 1 or os.environ.get("PET_NNODES", "1") != "1":
        _launch(number)


def count_processes(processes: int | str, device: str) -> int:
    """Turn `params.yaml`'s `processes` into a number; `auto` is one a GPU, else one."""
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
    """Say whether this is one of several processes, or the only one that torchrun has started."""
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """Return the number of processes of all machines."""
    return dist.get_world_size() if joined() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if joined() else 0


def local_rank() -> int | None:
    """Return the number of this process on its machine, `None` where it is the only one of all."""
    return int(os.environ["LOCAL_RANK"]) if joined() else None


def share() -> Share:
    """Return the part of this rank."""
    return Share(rank(), count())


def writes_outputs() -> bool:
    """Say whether this rank writes a stage's outputs: the first one of each machine, in a clone of its own."""
    return not local_rank()


def require_one_folder(folder: Path, name: str) -> None:
    """Refuse machines that do not see the same files in a folder; `name`: the setting that says where it is."""
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
    """Wait until all processes are here."""
    gather(None)


def gather(value: Item) -> list[Item]:
    """Return the value that each process gives, in their order."""
    if not joined():
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def agree(value: Item) -> Item:
    """Return the first process's value in all of them."""
    return gather(value)[0]


def add_up(values: Tensor) -> Tensor:
    """Return the sum of tensors of one shape over the processes."""
    if joined():
        values = values.clone()
        dist.all_reduce(values)
    return values


def require_same(params: Params, files: Sequence[Path]) -> None:
    """Refuse processes that do not have the same, since each reads its own machine's files."""
    if not joined():
        return
    own = params.model_dump(mode="json", exclude={"device", "workers", "processes", "cache", "data"})
    about = {"params.yaml": json.dumps(own), **{str(path): sha256_of(path) for path in files}}
    differ = [name for name, value in about.items() if agree(value) != value]
    if names := [name for names in gather(differ) for name in names]:
        raise StageError(f"{names[0]}: not the same on all machines; start from the same commit with the same images")


def leave() -> None:
    """End what the ranks do together; those that write no outputs end here, with success."""
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
    if sys.platform == "linux":  # a launcher that is killed takes its processes with it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    backend = "gloo"
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    end_with_the_others()
    dist.init_process_group(backend, timeout=_PATIENCE)


def _be_quiet() -> None:
    """Leave it to the first process to say what happens; errors are still heard."""
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (to the end of the process)
    sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)
    warnings.simplefilter("ignore")


class _NoTerminal(TextIOWrapper):
    """A stream on which nobody shows a progress bar."""

    def isatty(self) -> bool:
        return False


def _launch(number: int) -> NoReturn:
    """Start this command `number` times with torchrun, and end as the processes do."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // number)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a warning for each address without a name
    # What it has to say of a failure takes a page; the processes' own line follows below.
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="dvc-finetune-") as errors:
        options = [f"--nproc-per-node={number}", f"--log-dir={errors}", "--no-python"]
        try:
            arguments = torchrun.parse_args([*options, sys.executable])  # type: ignore[no-untyped-call]
            # Not for its parser, which would take a stage's --start for the beginning of an option of its own.
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
    """Return one line for what ended the processes: the first that did not end because of another.

    Those lose their connection, or torchrun ends them by SIGTERM.
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
