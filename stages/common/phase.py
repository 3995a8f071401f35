"""One phase of training, from checkpoint to checkpoint: what `train_head` and `finetune` have in common."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from stages.common.activations import Source, keep, make_inputs
from stages.common.checkpoint import Description, load_checkpoint, save_checkpoint
from stages.common.command import StageError
from stages.common.device import Precision, make_deterministic, resolve_device, reuse_freed_memory
from stages.common.epoch import still_falling
from stages.common.history import History
from stages.common.index import read_index, read_watched
from stages.common.network import Network, cut, set_trainable
from stages.common.objective import weigh_classes
from stages.common.params import ClassWeights, Finetune, Phase
from stages.common.resume import StateFile
from stages.common.training import Trainer
from stages.common.workers import resolve_workers


@dataclass(frozen=True)
class Setting:
    """What both phases take from `params.yaml`, by the names it has there; `root` is `data.path`."""

    root: Path
    seed: int
    device: str
    workers: int | str
    precision: str
    class_weights: ClassWeights
    max_gigabytes: float


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
    files: Files, phase: Phase, unfreeze: int, setting: Setting, next_unfreeze: int | None = None
) -> tuple[Network, Description]:
    """Train the head and the last `unfreeze` blocks; write the checkpoint and the history.

    Fine-tuning with `select: best` keeps the checkpoint that it starts from, epoch 0, where no epoch lowers the
    validation loss: also where the loss explodes. A new head is no such start.

    A validation part that is empty is replaced by the test part. A run that was stopped goes on after its last finished
    epoch.

    Args:
        files: what to read and write.
        phase: how to train.
        unfreeze: blocks.
        setting: what the phases have in common.
        next_unfreeze: the blocks that the next phase trains: what enters them is kept in passing, which saves that
            phase a pass over the pictures.

    Returns:
        The trained network, on the CPU, and its description.

    Raises:
        StageError: something to put right, before the first step; or a loss that is not finite where the start is
            no candidate, after the weights selected before it were written.
    """
    device, precision = resolve_device(setting.device), Precision(setting.precision)
    make_deterministic(setting.seed)
    reuse_freed_memory()
    train, watched = read_index(files.train), read_watched(files.val, files.test)
    network, description = load_checkpoint(files.start, train)
    class_weights = weigh_classes(setting.class_weights, train)
    set_trainable(network, unfreeze)
    prefix, tail = cut(network.to(device), unfreeze)
    workers = resolve_workers(setting.workers)
    source = Source(setting.root, description.preprocessing, prefix, device, precision, workers)
    unchanging = [*train, *watched] if phase.augment == "none" else watched
    kept = keep(source, unchanging, setting.max_gigabytes, next_unfreeze)
    state = StateFile(
        device,
        setting.max_gigabytes,
        [
            files.start,
            files.train,
            files.val,
            files.test,
            phase.model_dump(),
            unfreeze,
            setting.seed,
            setting.precision,
            setting.class_weights,
        ],
    )
    history = History(files.history)
    finetuning = isinstance(phase, Finetune)
    fit = Trainer(tail, device, precision, class_weights).fit(
        make_inputs(source, kept, train, phase.batch_size, phase.augment, shuffle_seed=setting.seed),
        make_inputs(source, kept, watched, phase.batch_size),
        phase,
        history.add,
        state,
        keep_start=finetuning,
        layer_decay=phase.layer_decay if isinstance(phase, Finetune) else 1.0,
    )
    network.cpu()
    history.finish(fit.selected)
    save_checkpoint(files.output, network, description)
    state.remove()
    if fit.failure is not None:
        if not finetuning or phase.select == "last":
            raise StageError(f"{fit.failure}; {files.output} keeps epoch {fit.selected.number}")
        print(f"training stopped: {fit.failure}")
    selected = fit.selected
    why = "" if selected.number else "no epoch lowered the validation loss: "
    print(f"kept epoch {selected.number}: {why}val_loss {selected.val_loss:.4f}, accuracy {selected.accuracy:.2%}")
    if not finetuning and still_falling(fit.epochs, phase.epochs, phase.patience):
        print(f"the validation loss was still falling after all {phase.epochs} epochs: raise train_head.epochs")
    return network, description
