"""One phase of training, from checkpoint to checkpoint: what `train_head` and `finetune` have in common."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from stages.common.checkpoint import Description, load_checkpoint, save_checkpoint
from stages.common.command import StageError
from stages.common.device import make_deterministic, resolve_device
from stages.common.history import History
from stages.common.images import Batches
from stages.common.index import read_index, read_watched
from stages.common.network import Network, set_trainable
from stages.common.params import Phase
from stages.common.training import Trainer
from stages.common.workers import resolve_workers


@dataclass(frozen=True)
class Files:
    """What a phase reads (`start` is a checkpoint; the others are index files) and writes."""

    start: Path
    train: Path
    val: Path
    test: Path
    output: Path
    history: Path

    @staticmethod
    def add_to(parser: argparse.ArgumentParser) -> None:
        """Give a stage script these files as arguments."""
        parser.add_argument("--start", type=Path, required=True, help="checkpoint to start from")
        for part in ("train", "val", "test"):
            parser.add_argument(f"--{part}", type=Path, required=True, help="index file")
        parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
        parser.add_argument("--history", type=Path, required=True, help="folder for the history")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Files":
        """Take them from the parsed arguments."""
        return cls(**{name: getattr(arguments, name) for name in cls.__dataclass_fields__})


def run_phase(
    files: Files, phase: Phase, unfreeze: int, root: Path, seed: int, device: str, workers: int | str
) -> tuple[Network, Description]:
    """Train the head and the last `unfreeze` blocks; write the checkpoint and the history.

    A validation part that is empty is replaced by the test part.

    Returns:
        The trained network, on the CPU, and its description.

    Raises:
        StageError: something to put right, before the first step; or a loss that is not finite, after the weights
            selected before it were written.
    """
    chosen_device, processes = resolve_device(device), resolve_workers(workers)
    make_deterministic(seed)
    train, watched = read_index(files.train), read_watched(files.val, files.test)
    network, description = load_checkpoint(files.start, train)
    set_trainable(network, unfreeze)
    preprocessing = description.preprocessing
    history = History(files.history)
    fit = Trainer(network, chosen_device).fit(
        Batches(root, train, preprocessing, phase.batch_size, processes, phase.augment, shuffle_seed=seed),
        Batches(root, watched, preprocessing, phase.batch_size, processes),
        phase,
        history.add,
    )
    network.cpu()
    history.finish(fit.selected)
    save_checkpoint(files.output, network, description)
    if fit.failure is not None:
        raise StageError(f"{fit.failure}; {files.output} keeps epoch {fit.selected.number}")
    print(
        f"kept epoch {fit.selected.number}: val_loss {fit.selected.val_loss:.4f}, accuracy {fit.selected.accuracy:.2%}"
    )
    return network, description
