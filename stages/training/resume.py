"""The state of a stopped training, which resumes after its last finished epoch and ends with the same bytes.

It is in the user's cache, since DVC removes a stage's outputs before it runs. Its name is a hash of everything the
training depends on, so only the same training finds it.
"""

import hashlib
import json
import pickle
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stages
from stages.common import ranks
from stages.common.files import hash_code, sha256_of, whole_file
from stages.training import cache
from stages.training.history import Epoch

# Subpackages whose code affects training.
_ROOMS = ("common", "images", "network", "training")
# Writing a state of half a gigabyte can take as long as an epoch: it is written when more work would be lost.
SECONDS = 30.0


@dataclass(frozen=True)
class State:
    """A training after an epoch.

    `epochs`: all finished ones; `weights`: the trained tensors; `selected`: those of the epoch selected so far, `None`
    if it is the last; `optimizer`: its state; `random`: the `random_state` of each rank.
    """

    epochs: list[Epoch]
    weights: list[Tensor]
    selected: list[Tensor] | None
    optimizer: dict[str, Any]
    random: list[dict[str, Tensor]]


class StateFile:
    """The file with the state of one training.

    `depends_on`: JSON values, and paths of files, whose bytes count: everything that affects the result.
    """

    def __init__(self, device: torch.device, max_gigabytes: float, depends_on: list[Any]) -> None:
        self.device, self.max_gigabytes = device, max_gigabytes
        about = [*(sha256_of(value) if isinstance(value, Path) else value for value in depends_on)]
        code = hash_code(Path(stages.__path__[0]), _ROOMS)
        text = json.dumps([about, code, device.type, torch.__version__, ranks.count()], sort_keys=True)
        self.path = cache.states_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.pt"
        self._can_be_written = True
        self._written = time.monotonic()

    def save(self, state: State) -> None:
        """Write a state, whole or not at all, if `SECONDS` have passed since the last one; print why if that fails."""
        if not ranks.agree(self._can_be_written and time.monotonic() - self._written >= SECONDS):
            return
        self._written = time.monotonic()
        if ranks.rank():
            return
        values = {"weights": state.weights, "selected": state.selected, "optimizer": state.optimizer}
        epochs = [asdict(epoch) for epoch in state.epochs]
        try:
            self._write({"epochs": epochs, "random": state.random, **values})
        except OSError as error:
            self._can_be_written = False
            print(f"a run that is stopped will start again, its state is not kept: {cache.explain(error)}", flush=True)
        self._written = time.monotonic()

    def _write(self, values: dict[str, Any]) -> None:
        cache.make_room(_nbytes(values), self.max_gigabytes, spare=[self.path])
        with whole_file(self.path) as file:
            try:
                torch.save(values, file)
            except RuntimeError as error:
                # On a full disk torch's writer fails a second time when it closes, which hides the first error.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def load(self) -> State | None:
        """Return the state, or `None`; a state that is damaged, or not on all ranks, is ignored."""
        state = self._load()
        finished = ranks.gather(None if state is None else state.epochs[-1].number)
        return state if len(set(finished)) == 1 else None

    def _load(self) -> State | None:
        try:
            values = torch.load(self.path, map_location=self.device, weights_only=True)
            epochs = [Epoch(**epoch) for epoch in values["epochs"]]
            return State(epochs, values["weights"], values["selected"], values["optimizer"], values["random"])
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            print(f"{self.path}: damaged ({reason}), starting from the beginning", flush=True)
            return None

    def remove(self) -> None:
        """Remove the state, once the outputs of the training are written."""
        if not ranks.rank():
            with suppress(OSError):
                self.path.unlink()


def _nbytes(value: object) -> int:
    """Return the size of all tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0
