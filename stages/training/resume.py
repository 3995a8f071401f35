"""The state of a training that was stopped: it goes on after its last finished epoch, and ends with the same bytes.

The state is in the user's cache: DVC removes a stage's outputs before it runs. Its name is a hash of everything the
training depends on, so a state that does not fit is not found.
"""

import hashlib
import io
import json
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stages
from stages.common.files import write_bytes
from stages.training import cache
from stages.training.history import Epoch

# Whose code training depends on.
_ROOMS = ("common", "pictures", "network", "training")


@dataclass(frozen=True)
class State:
    """A training after an epoch.

    `epochs` are all that are finished; `weights` are the trained tensors, `selected` those of the epoch selected so far
    (`None`: the same); `optimizer` is its state; `random` is what `random_state` returned then.
    """

    epochs: list[Epoch]
    weights: list[Tensor]
    selected: list[Tensor] | None
    optimizer: dict[str, Any]
    random: dict[str, Tensor]


class StateFile:
    """Where one training keeps its state.

    Args:
        device: where the training computes.
        max_gigabytes: of the whole cache.
        depends_on: JSON values, files by their bytes: all that another result could come from.
    """

    def __init__(self, device: torch.device, max_gigabytes: float, depends_on: list[Any]) -> None:
        self.device, self.max_gigabytes = device, max_gigabytes
        folder = Path(stages.__path__[0])
        code = {
            path.relative_to(folder).as_posix(): _hash(path)
            for room in _ROOMS
            for path in sorted((folder / room).rglob("*.py"))
        }
        about = [*(_hash(value) if isinstance(value, Path) else value for value in depends_on)]
        text = json.dumps([about, code, device.type, torch.__version__], sort_keys=True)
        self.path = cache.cache_folder() / "states" / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.pt"
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._can_be_written = True

    def save(self, state: State) -> None:
        """Take a state down as it is now, and write it, whole or not at all, while training goes on.

        Writing takes as long as a short epoch. A process that is killed meanwhile leaves the state before; one that
        ends in any other way finishes writing. Where a state cannot be written, a line says why.
        """
        self._wait()
        if not self._can_be_written:
            return
        content = io.BytesIO()
        values = {"weights": state.weights, "selected": state.selected, "optimizer": state.optimizer}
        epochs = [asdict(epoch) for epoch in state.epochs]
        torch.save({"epochs": epochs, "random": state.random, **values}, content)
        self._writing = self._writer.submit(self._write, content.getbuffer())

    def _write(self, content: memoryview) -> None:
        cache.make_room(content.nbytes, self.max_gigabytes)
        write_bytes(self.path, content)

    def _wait(self) -> None:
        try:
            if self._writing is not None:
                self._writing.result()
        except OSError as error:
            self._can_be_written = False
            print(f"a stopped run will start anew, its state is not kept: {cache.explain(error)}", flush=True)
        finally:
            self._writing = None

    def load(self) -> State | None:
        """Return the state, if there is one; one that is damaged is ignored, with a line."""
        try:
            values = torch.load(self.path, map_location=self.device, weights_only=True)
            epochs = [Epoch(**epoch) for epoch in values["epochs"]]
            return State(epochs, values["weights"], values["selected"], values["optimizer"], values["random"])
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            print(f"{self.path}: damaged ({str(error).splitlines()[0]}), starting anew", flush=True)
            return None

    def remove(self) -> None:
        """Remove the state: the training has ended, and its outputs are written."""
        self._wait()
        with suppress(OSError):
            self.path.unlink()


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
