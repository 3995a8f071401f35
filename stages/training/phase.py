"""What the pages of both phases have in common around the training itself: what is read, and what is left behind."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.common import ranks
from stages.common.cli import StageError
from stages.common.device import resolve_device
from stages.common.memory import reuse_freed_memory
from stages.common.params import Finetune, Params, Phase
from stages.common.ranks import Share
from stages.common.seeds import make_deterministic, seed_for
from stages.common.workers import resolve_workers
from stages.images.index import Entry, read_index
from stages.network.checkpoint import Description, load_checkpoint, require_classes, save_checkpoint
from stages.network.network import Network
from stages.training import cache
from stages.training.activations import fit, keep
from stages.training.history import History
from stages.training.inputs import Inputs, open_batches, read_all
from stages.training.loop import Fit
from stages.training.prefix import FrozenPrefix
from stages.training.resume import StateFile
from stages.training.search import Found, find_head

_READ_AT_ONCE = 1024  # rows
# Of `epochs: auto`: few images need several hundred steps, and many cost as much as few (docs/recipe.md).
_IMAGES_SEEN, _LEAST_EPOCHS, _MOST_EPOCHS = 4_800, 3, 30


@dataclass(frozen=True)
class Pictures:
    """The pictures to train on, and those to watch: the validation part, or the test part where that is empty."""

    train: list[Entry]
    watched: list[Entry]
    watches_test: bool

    def local(self, share: Share) -> "Pictures":
        """Return those of them that stay with the processes of one store."""
        return Pictures(share.local(self.train), share.local(self.watched), self.watches_test)

    def unchanging(self, phase: Phase) -> list[Entry]:
        """Return those that look the same in each epoch."""
        return [*self.train, *self.watched] if phase.augment == "none" else self.watched


def count_epochs(epochs: int | str, images: int) -> int:
    """Turn `finetune.epochs` into a number: `auto` sees as many images, whatever their number, in 3 to 30 epochs.

    Args:
        epochs: a number, or `auto`.
        images: to train on.
    """
    if isinstance(epochs, int):
        return epochs
    return min(_MOST_EPOCHS, max(_LEAST_EPOCHS, round(_IMAGES_SEEN / images)))


def settle(phase: Finetune, pictures: Pictures) -> Finetune:
    """Return fine-tuning's parameters for these pictures: a number of epochs, and no line without validation images."""
    select = phase.select
    if select == "line" and pictures.watches_test:
        print("no validation pictures: the end of the schedule is kept, as with finetune.select=last")
        select = "last"
    return phase.model_copy(update={"epochs": count_epochs(phase.epochs, len(pictures.train)), "select": select})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a page the files of a phase as arguments."""
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True, help="folder with train.csv, val.csv and test.csv")
    parser.add_argument("--start", type=Path, required=True, help="checkpoint to start from")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--history", type=Path, required=True, help="folder for the history")


def prepare(params: Params) -> torch.device:
    """Set up this process for training, and return the device to compute on."""
    device = resolve_device(params.device)
    number = ranks.rank()
    # With one seed for all, dropout would leave out the same places in each part of a batch.
    make_deterministic(seed_for(params.seed, number) if number else params.seed)
    reuse_freed_memory()
    return device


def load(start: Path, index: Path, params: Params) -> tuple[Network, Description, Pictures]:
    """Load a checkpoint and the pictures to train it on.

    Raises:
        StageError: either file is missing or damaged, they are of different classes, or other machines have others.
    """
    ranks.require_same(params, _inputs(start, index))
    train, val = (read_index(index / f"{part}.csv") for part in ("train", "val"))
    pictures = Pictures(train, val or read_index(index / "test.csv"), watches_test=not val)
    network, description = load_checkpoint(start)
    require_classes(start, description, pictures.train)
    return network, description, pictures


def open_prefix(blocks: nn.Sequential, description: Description, device: torch.device, params: Params) -> FrozenPrefix:
    """Put the pictures before the blocks that training does not change."""
    root, workers = Path(params.data.path), resolve_workers(params.workers)
    share = ranks.share(cache.activations_folder())
    preprocessing = description.preprocessing
    return FrozenPrefix(blocks, root, preprocessing, device, params.precision, workers, share=share)


def open_inputs(
    prefix: FrozenPrefix, pictures: Pictures, phase: Phase, params: Params, later: Finetune | None = None
) -> tuple[Inputs, Inputs]:
    """Compute and keep the activations that a phase trains on and watches; return batches of both.

    What enters the blocks that a `later` phase will train is kept in passing, which saves it a pass over the pictures.

    Raises:
        StageError: there are more processes than pictures in a batch.
    """
    _divide_batches(phase, len(pictures.train), prefix.share)
    gigabytes, local = params.cache.max_gigabytes, pictures.local(prefix.share)
    if later is not None:
        prefix = fit(prefix, later.unfreeze, len(local.unchanging(phase)), gigabytes)
    also = {} if later is None else {later.unfreeze: local.unchanging(later)}
    kept = keep(prefix, local.unchanging(phase), gigabytes, also)
    train = open_batches(prefix, pictures.train, kept, phase.batch_size, phase.augment, params.seed)
    return train, open_batches(prefix, pictures.watched, kept, phase.batch_size)


def search_head(
    prefix: FrozenPrefix, pictures: Pictures, description: Description, params: Params, weights: Tensor | None
) -> Found:
    """Find a head on the kept features; of several processes, the first does.

    Args:
        prefix: the whole backbone, with the pooling.
        pictures: what to train on, and what to watch.
        description: of the checkpoint, for the units of a hidden layer.
        params: of the head phase, and the seed.
        weights: (classes,), as for `objective.loss`, or `None`.
    """
    every = [*pictures.train, *pictures.watched]
    kept = keep(prefix, prefix.share.local(every), params.cache.max_gigabytes)
    features = torch.cat(list(read_all(prefix, every, kept, _READ_AT_ONCE, "features"))).flatten(1)
    found: Found | None = None
    if ranks.rank() == 0:
        val = [] if pictures.watches_test else pictures.watched
        features = features.to(prefix.device)
        found = find_head(
            features, pictures.train, val, pictures.watched, description.hidden, params.train_head, weights, params.seed
        )
    found = ranks.agree(found)
    assert found is not None
    return found


def _divide_batches(phase: Phase, pictures: int, share: Share) -> None:
    """Say what part of a batch each of several processes has."""
    whole = min(phase.batch_size, pictures)
    least, more = divmod(whole, share.count)
    if not least:
        raise StageError(f"processes: {share.count} are more than a batch has pictures, {whole}; use fewer")
    if share.count > 1:
        each = f"{least} or {least + 1}" if more else f"{least}"
        print(f"{share.count} processes, each has {each} pictures of a batch of {whole}", flush=True)


def open_history(arguments: argparse.Namespace) -> History:
    """Return the history to write; of several processes, the first that sees the folder writes."""
    return History(arguments.history, ranks.share(arguments.output.parent).leads)


def open_state(
    script: str, arguments: argparse.Namespace, phase: Phase, params: Params, device: torch.device
) -> StateFile:
    """Return where a stopped run of this phase keeps its state: it resumes after its last finished epoch."""
    files = [Path(script), *_inputs(arguments.start, arguments.index)]
    settings = [phase.model_dump(), params.seed, params.precision, params.class_weights]
    share = ranks.share(cache.states_folder())
    return StateFile(device, params.cache.max_gigabytes, [*files, *settings], share)


def describe(description: Description, fit: Fit, pictures: Pictures) -> Description:
    """Return the description of the trained network, with its temperature.

    None is fitted where training watched the test pictures. A start that was kept keeps its own.
    """
    if pictures.watches_test or not fit.selected.number:
        return description
    return replace(description, temperature=(fit.point or fit.selected).temperature)


def finish(
    output: Path, network: Network, description: Description, fit: Fit, history: History, state: StateFile
) -> None:
    """Write the checkpoint and end the history; of several processes, those that write nothing end here.

    Raises:
        StageError: training failed with no start to fall back on; the weights selected before it did are written.
    """
    if history.writes:
        history.finish(fit.selected, fit.point)
        save_checkpoint(output, network, description)
    ranks.wait()
    state.remove()
    ranks.leave(history.writes)
    selected, point = fit.selected, fit.point
    if fit.failure is not None:
        if not fit.start_competed:
            raise StageError(f"{fit.failure}; {output} keeps epoch {selected.number}")
        print(f"training stopped: {fit.failure}")
    kept, why = f"epoch {selected.number}", ""
    if not selected.number:
        why = f": {'no point towards the end' if fit.line else 'no epoch'} has a lower validation loss"
    elif point is not None:
        kept = f"{point.alpha:.0%} of the change"
    loss, accuracy = (selected.val_loss, selected.accuracy) if point is None else (point.val_loss, point.accuracy)
    print(f"kept {kept} (val_loss {loss:.4f}, accuracy {accuracy:.2%}){why}")


def _inputs(start: Path, index: Path) -> list[Path]:
    return [start, *(index / f"{part}.csv" for part in ("train", "val", "test"))]
