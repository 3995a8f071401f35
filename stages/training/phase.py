"""What the training stages share: their inputs and outputs, and predictions of both finished networks."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.common import ranks
from stages.common.cli import StageError
from stages.common.device import make_deterministic, resolve_device, seed_for
from stages.common.machine import resolve_workers, reuse_freed_memory
from stages.common.params import Params, Phase
from stages.images.index import Entry, read_index
from stages.network.checkpoint import Description, load_checkpoint, require_classes, save_checkpoint
from stages.network.network import Network, count_shared_blocks, cut
from stages.training.batches import open_batches
from stages.training.features import FrozenPrefix, Kept, keep
from stages.training.history import History
from stages.training.loop import Fit, Trainer, predict
from stages.training.resume import StateFile


@dataclass(frozen=True)
class Entries:
    """The images to train on and to watch: the validation split, or the test split if that is empty."""

    train: list[Entry]
    watched: list[Entry]
    watches_test: bool

    @property
    def validation(self) -> list[Entry]:
        """The validation split, which may be empty."""
        return [] if self.watches_test else self.watched

    def unchanging(self, phase: Phase) -> list[Entry]:
        """Return the images that are the same in every epoch."""
        return [*self.train, *self.watched] if phase.augment == "none" else self.watched


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files of a phase to a script's arguments."""
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True, help="folder with train.csv, val.csv and test.csv")
    parser.add_argument("--start", type=Path, required=True, help="checkpoint to start from")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--history", type=Path, required=True, help="folder for the history")


def prepare(params: Params) -> torch.device:
    """Become one of several ranks if the parameters ask for it; set up torch, and return the device."""
    ranks.start_processes(params.processes, params.device)
    device = resolve_device(params.device)
    rank = ranks.rank()
    # With the same seed on all ranks, dropout would drop the same positions in each part of a batch.
    make_deterministic(seed_for(params.seed, rank) if rank else params.seed)
    reuse_freed_memory()
    return device


def read_entries(index: Path) -> Entries:
    """Read the images to train on and to watch; raises what `read_index` does."""
    train, val = (read_index(index / f"{part}.csv") for part in ("train", "val"))
    return Entries(train, val or read_index(index / "test.csv"), watches_test=not val)


def load(start: Path, index: Path, params: Params) -> tuple[Network, Description, Entries]:
    """Load a checkpoint and the images to train it on.

    Raises StageError if a file is missing or damaged, classes differ, or another machine has other files.
    """
    ranks.require_same(params, _inputs(start, index))
    entries = read_entries(index)
    network, description = load_checkpoint(start)
    require_classes(start, description, entries.train)
    return network, description, entries


def open_prefix(blocks: nn.Sequential, description: Description, device: torch.device, params: Params) -> FrozenPrefix:
    """Return frozen blocks with the preprocessing of images for them."""
    root, workers = Path(params.data.path), resolve_workers(params.workers)
    return FrozenPrefix(blocks, root, description.preprocessing, device, params.precision, workers)


def keep_features(
    network: Network, description: Description, entries: Entries, device: torch.device, params: Params
) -> tuple[FrozenPrefix, Kept]:
    """Store, in one pass over the images, the inputs of the head and of the blocks that fine-tuning will train.

    Returns the prefix of all blocks, and the stored inputs of the head.
    """
    phase, later = params.train_head, params.finetune
    blocks, _ = cut(network.to(device), unfreeze=0)
    prefix, end = open_prefix(blocks, description, device, params), len(blocks)
    searches = phase.search and description.head == "pooled"
    wanted = {end: [*entries.train, *entries.watched] if searches else entries.unchanging(phase)}
    if later.unfreeze <= end:
        wanted.setdefault(end - later.unfreeze, entries.unchanging(later))
    return prefix, keep(prefix, wanted, params.cache.max_gigabytes)[end]


def require_enough(phase: Phase, images: int) -> None:
    """Print the batch size of each rank; raises StageError if a rank would have no image."""
    whole, count = min(phase.batch_size, images), ranks.count()
    least, more = divmod(whole, count)
    if not least:
        raise StageError(f"processes: {count} are more than a batch has images, {whole}; use fewer")
    if count > 1:
        each = f"{least} or {least + 1}" if more else f"{least}"
        print(f"{count} processes, each has {each} images of a batch of {whole}", flush=True)


def open_state(script: str, arguments: argparse.Namespace, phase: Phase, params: Params) -> StateFile:
    """Return the state file of this phase; a stopped run resumes after its last finished epoch."""
    files = [Path(script), *_inputs(arguments.start, arguments.index)]
    settings = [phase.model_dump(), params.seed, params.precision, params.class_weights]
    return StateFile(resolve_device(params.device), params.cache.max_gigabytes, [*files, *settings])


def finish(
    output: Path,
    network: Network,
    description: Description,
    fit: Fit,
    entries: Entries,
    history: History,
    state: StateFile,
    phase: Phase,
    calibrated: bool,
) -> None:
    """Write the checkpoint and end the history.

    `calibrated`: the start has a temperature. That of the result is the start's, times the ratio of the temperatures
    fitted to the validation images afterwards and before: the start's may be fitted to more images, and peculiarities
    of the validation images cancel. Training on hard labels makes a network too sure (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599), so validation images that then ask for a ratio below 1 are easier than others
    (docs/recipe.md), and it is 1. It is never below the one fitted to the validation images: a few that the start gets
    far too wrong raise the temperature before, and so hide how much surer all of the network has become. Without
    `calibrated`, it is this one, or 1 if training watched the test images.

    Raises:
        StageError: training failed and cannot fall back on the start; the weights selected before are written.
    """
    selected, point = fit.selected, fit.point
    if not entries.watches_test and selected.number:
        temperature = (point or selected).temperature
        if calibrated:
            ratio = temperature / fit.epochs[0].temperature
            soft_labels = phase.label_smoothing > 0 or phase.mixup > 0
            temperature = max(temperature, description.temperature * (ratio if soft_labels else max(ratio, 1.0)))
        description = replace(description, temperature=temperature)
    history.finish(selected, point)
    save_checkpoint(output, network.cpu(), description)
    state.remove()
    if fit.failure is not None:
        if not fit.start_competed:
            raise StageError(f"{fit.failure}; {output} keeps epoch {selected.number}")
        print(f"training stopped: {fit.failure}")
    kept, why = f"epoch {selected.number}", ""
    if not selected.number:
        why = f": no {'point towards the end has a clearly' if fit.line else 'epoch has a'} lower validation loss"
    elif point is not None:
        kept = f"{point.alpha:.0%} of the change"
    scores = selected if point is None else point
    print(f"kept {kept} (val_loss {scores.val_loss:.4f}, accuracy {scores.accuracy:.2%}){why}")


def _inputs(start: Path, index: Path) -> list[Path]:
    return [start, *(index / f"{part}.csv" for part in ("train", "val", "test"))]


def predict_with_both(
    head: Network, finetuned: Network, description: Description, test: list[Entry], params: Params
) -> list[Tensor]:
    """Return the logits of both checkpoints, (n, outputs), float64; their shared blocks run once."""
    device = resolve_device(params.device)
    unfrozen = len(head.backbone) - count_shared_blocks(head, finetuned)
    blocks, tail = cut(head.to(device), unfrozen)
    prefix = open_prefix(blocks, description, device, params)
    kept = keep(prefix, {len(blocks): test}, params.cache.max_gigabytes)[len(blocks)]
    trainers = [Trainer(network, device, params.precision) for network in (tail, cut(finetuned, unfrozen)[1])]
    return predict(trainers, open_batches(prefix, test, kept, params.evaluate.batch_size))
