"""Head search: linear heads and heads with a hidden layer, compared by cross-validation on frozen features.

The features are centred. Then either each is divided by its own spread, or all by their common spread, which weights
features by how much they vary. Linear heads decide which, since it depends on network and dataset (docs/recipe.md).

Heads with a hidden layer are trained by the parameters of `train_head` except the learning rate. Out-of-fold logits of
all training and validation images choose the candidate and the temperature.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stages.common import ranks
from stages.common.device import generator_for
from stages.common.files import write_bytes
from stages.common.params import TrainHead
from stages.images.division import order_units
from stages.images.index import Entry
from stages.network import objective
from stages.network.checkpoint import Description
from stages.network.network import POOLING, Network, Standardize
from stages.network.objective import Losses, fit_temperature, score_logits
from stages.training.heads import Data, train_hidden, train_linear
from stages.training.history import Epoch
from stages.training.phase import Entries

FOLDS = 5
# For the sum of the losses, on standardized features: scikit-learn's 1 / C.
PENALTIES = tuple(10 ** (exponent / 2) for exponent in range(-3, 7))
# Of `train_head.lr`, in order; each is a training per fold, so a higher rate is tried only if it may help.
RATES = (0.3, 1.0, 3.0)
# A head with a training loss below this fraction of its out-of-fold loss has fit its images: no higher rate helps.
_FITTED = 0.5
# Training and validation images used to compare candidates; more of them choose no better and take longer.
SAMPLE = 5_000
# Images with features in memory.
MOST = 100_000
# By the final training of a head with a hidden layer: with many images, fewer epochs suffice.
_IMAGES_SEEN = 1_000_000
# Passes over the images to train a linear head: for comparison, and for the final one.
_PASSES, _FINAL_PASSES = 100, 200
# Logits of linear heads in memory at once. If those of all penalties are more, penalties are tried one by one.
_MOST_VALUES = 2**22


@dataclass(frozen=True)
class Candidate:
    """A head to try: linear with a `penalty`, or with a hidden layer and `lr`; the other one is `None`.

    `common`: its features are divided by their common spread, not each by its own; `loss`, the mean log-loss, and
    `accuracy` are out-of-fold.
    """

    penalty: float | None
    lr: float | None
    common: bool = False
    loss: float = math.nan
    accuracy: float = math.nan


@dataclass(frozen=True)
class _Tried:
    """A candidate with its scores, the heads that have not seen fold 0, 1, ..., and the loss of each image, (n,)."""

    candidate: Candidate
    heads: list[nn.Module]
    losses: Losses


def assign_folds(entries: list[Entry], seed: int) -> Tensor:
    """Return the fold of each image, (n,), from 0; stratified by class, with duplicates and groups in one fold."""
    seen: dict[str, int] = {}
    folds: dict[str, int] = {}
    for unit in order_units(entries, seed):
        name = unit.entries[0].class_name
        seen[name] = seen.get(name, -1) + 1
        folds |= dict.fromkeys((entry.sha256 for entry in unit.entries), seen[name] % FOLDS)
    return torch.tensor([folds[entry.sha256] for entry in entries])


def search(
    data: Data, ratio: Tensor, folds: Tensor, hidden: int, phase: TrainHead, seed: int
) -> tuple[list[Candidate], list[nn.Module]]:
    """Compare all candidates on training and validation images; `folds`, (n,), are on the CPU.

    `ratio`, (d,): the spread of each feature over the common one. Features times `ratio` are tried, too. They are
    taken if they lower the best linear head's out-of-fold loss by more than a standard error of the paired difference.

    Returns:
        The candidates, the chosen one first, the others by out-of-fold loss; of the first one, the heads that have not
        seen fold 0, 1, ...
    """
    sampled = torch.randperm(len(folds), generator=generator_for(seed))[:SAMPLE].sort().values
    chosen = torch.zeros(len(folds), dtype=torch.bool).index_fill(0, sampled, True)
    rows = [torch.where(chosen & (folds != fold))[0] for fold in range(FOLDS)]
    tried = _try_linear(data, folds, rows, phase)
    best, scaled = tried[0], replace(data, features=data.features * ratio)
    # The mean square of all features is 1 either way, so the best penalty is nearly the same.
    others = _try_linear(scaled, folds, rows, phase, best.candidate.penalty)
    gain = best.losses - others[0].losses
    if common := bool(gain.mean() > gain.std() / math.sqrt(len(gain))):
        data, tried, others = scaled, others, tried
    lowest = math.inf
    for rate in RATES:
        lr = rate * phase.lr
        *_, heads = train_hidden(data, rows, hidden, phase.model_copy(update={"lr": lr}), seed)
        tried.append(_judge(Candidate(None, lr), heads, data, folds))
        with torch.inference_mode():
            losses = [
                objective.loss(head(data.features[own]), data.labels[own], data.weights)
                for head, own in zip(heads, rows, strict=True)
            ]
        loss = tried[-1].candidate.loss
        if sum(map(float, losses)) / FOLDS < _FITTED * loss or loss >= lowest:
            break
        lowest = loss
    best, *rest = sorted(tried, key=_loss)
    listed = [replace(one.candidate, common=common) for one in rest]
    listed += [replace(one.candidate, common=not common) for one in others]
    return [replace(best.candidate, common=common), *sorted(listed, key=lambda one: one.loss)], best.heads


def _try_linear(
    data: Data, folds: Tensor, rows: list[Tensor], phase: TrainHead, near: float | None = None
) -> list[_Tried]:
    """Train linear heads on the images of each fold, `rows`, and judge them on the others; lowest loss first.

    `near`: only this one of `PENALTIES` and its neighbours are tried.
    """
    tried: list[_Tried] = []
    grid = PENALTIES
    if near is not None:
        place = PENALTIES.index(near)
        grid = PENALTIES[max(place - 1, 0) : place + 2]

    def train(*penalties: float) -> float:
        """Try several penalties at once; return the loss of the last one."""
        each = [penalty for penalty in penalties for _ in range(FOLDS)]
        (heads,) = train_linear(data, rows * len(penalties), each, phase.label_smoothing, _PASSES, _PASSES)
        for number, penalty in enumerate(penalties):
            own = heads[FOLDS * number : FOLDS * (number + 1)]
            tried.append(_judge(Candidate(penalty, None), own, data, folds))
        return tried[-1].candidate.loss

    images = len(torch.unique(torch.cat(rows)))
    if len(grid) * FOLDS * images * data.outputs <= _MOST_VALUES:
        train(*grid)
    else:
        # From the middle, the loss falls to one side only, until its minimum.
        middle = len(grid) // 2
        start = train(grid[middle])
        for side in (grid[middle + 1 :], grid[:middle][::-1]):
            lowest = start
            for penalty in side:
                if (loss := train(penalty)) >= lowest:
                    break
                lowest = loss
            if lowest < start:
                break
    return sorted(tried, key=_loss)


def _judge(candidate: Candidate, heads: list[nn.Module], data: Data, folds: Tensor) -> _Tried:
    # Without a temperature: an overfitted head is a bad start for fine-tuning, however well its logits are scaled.
    logits, labels = _predict_out_of_fold(heads, data.features, folds), data.labels.cpu()
    scores, losses = score_logits(logits, labels, data.weights, tempered=False)
    return _Tried(replace(candidate, loss=scores.loss, accuracy=scores.accuracy), heads, losses)


def _loss(tried: _Tried) -> float:
    return tried.candidate.loss


def _predict_out_of_fold(heads: list[nn.Module], features: Tensor, folds: Tensor) -> Tensor:
    rows = [torch.where(folds == fold)[0] for fold in range(FOLDS)]
    with torch.inference_mode():
        logits = torch.cat([head(features[own.to(features.device)]) for own, head in zip(rows, heads, strict=True)])
    return logits.cpu()[torch.cat(rows).argsort()]


@dataclass(frozen=True)
class Found:
    """The head that was found.

    `layers`: those after the pooling; `epochs`: the history of its training; `candidates`: all of them, the found one
    first; `entries` and `logits`, (n, outputs): the training and validation images with their out-of-fold logits;
    `temperature`: fitted to these logits.
    """

    layers: list[nn.Module]
    epochs: list[Epoch]
    candidates: list[Candidate]
    entries: list[Entry]
    logits: Tensor
    temperature: float

    def install(self, network: Network, description: Description) -> Description:
        """Replace a network's head by this one, and return the new description of its checkpoint."""
        pooling = [layer for layer in network.classifier if isinstance(layer, (*POOLING, nn.Flatten))]
        network.classifier = nn.Sequential(*pooling, *self.layers)
        hidden = 0 if self.candidates[0].lr is None else description.recipe["model"]["hidden"]
        return replace(description, hidden=hidden, standardized=True, temperature=self.temperature)


def find_head(
    read: Callable[[list[Entry]], Iterable[Tensor]],
    entries: Entries,
    hidden: int,
    phase: TrainHead,
    weights: Tensor | None,
    seed: int,
    device: torch.device,
) -> Found:
    """Choose a head by folds over training and validation images, and train it on the training images.

    All ranks read, and the first one searches. At most `MOST` images, drawn at random, are in memory.

    `read`: images -> batches of inputs of the head, (n, d, ...), flattened if not pooled; `hidden`: units of a hidden
    layer; `phase`: how heads with one are trained; `weights`: as for `objective.loss`.
    """
    every, labelled = [*entries.train, *entries.watched], [*entries.train, *entries.validation]
    chosen = torch.randperm(len(every), generator=generator_for(seed))[:MOST].sort().values
    used = [every[position] for position in chosen.tolist()]
    features = torch.cat([batch.flatten(1) for batch in read(used)]).to(device)
    folds = assign_folds(labelled, seed)
    count, known = int((chosen < len(entries.train)).sum()), int((chosen < len(labelled)).sum())
    spread, mean = torch.std_mean(features[:count], dim=0)
    together = spread.square().mean().sqrt()
    # Not 0 for a feature that is constant.
    spread = torch.where(spread > 0, spread, 1.0)
    features.sub_(mean).div_(spread)
    labels = torch.tensor([entry.label for entry in used], device=device)
    outputs = objective.outputs_for(max(entry.label for entry in every) + 1)
    heads: list[nn.Module] = []
    found: Found | None = None
    if ranks.rank() == 0:
        data = Data(features[:known], labels[:known], outputs, weights)
        ratio = spread / together if together > 0 else torch.ones_like(spread)
        candidates, heads = search(data, ratio, folds[chosen[:known]], hidden, phase, seed)
        if candidates[0].common:
            features *= ratio
            spread = spread / ratio
        epochs: list[Epoch] = []
        head = heads[0]
        for number, head in _train_again(candidates[0], data, count, hidden, phase, seed):
            with torch.inference_mode():
                logits = head(features).cpu()
            training, _ = score_logits(logits[:count], labels[:count].cpu(), weights, tempered=False)
            watching, _ = score_logits(logits[count:], labels[count:].cpu(), weights, tempered=not entries.watches_test)
            epochs.append(Epoch(number, training.loss, training.accuracy, watching.loss, watching.accuracy))
        layers = [layer.cpu() for layer in (Standardize(mean, spread), *head.children())]
        found = Found(layers, epochs, candidates, labelled, torch.empty(0), 1.0)
    del features
    logits, first = torch.zeros(len(labelled), outputs), 0
    for batch in read(labelled):
        if ranks.rank() == 0:
            own = slice(first, first := first + len(batch))
            standardized = (batch.flatten(1).to(device) - mean) / spread
            logits[own] = _predict_out_of_fold(heads, standardized, folds[own])
    found, logits = ranks.agree((found, logits))
    assert found is not None
    truth = torch.tensor([entry.label for entry in labelled])
    temperature = fit_temperature(logits, truth, weights)
    epochs = [replace(epoch, temperature=temperature) for epoch in found.epochs]
    return replace(found, epochs=epochs, logits=logits, temperature=temperature)


def _train_again(
    best: Candidate, data: Data, count: int, hidden: int, phase: TrainHead, seed: int
) -> Iterator[tuple[int, nn.Module]]:
    rows, every = [torch.arange(count)], 1
    if best.penalty is not None:
        every = _FINAL_PASSES // 10
        heads = train_linear(data, rows, [best.penalty], phase.label_smoothing, _FINAL_PASSES, every)
    else:
        epochs = min(phase.epochs, max(1, _IMAGES_SEEN // count))
        heads = train_hidden(data, rows, hidden, phase.model_copy(update={"lr": best.lr, "epochs": epochs}), seed)
    for number, (head,) in enumerate(heads, start=1):
        yield number * every, head


def describe_search(found: Found) -> str:
    """Return lines on the best linear head, the best one with a hidden layer, and which of them is kept."""
    common = found.candidates[0].common
    linear = next(one for one in found.candidates if one.lr is None and one.common == common)
    hidden = next(one for one in found.candidates if one.lr is not None)
    names = f"linear head, L2 penalty {linear.penalty:.3g}", f"head with a hidden layer, lr {hidden.lr:.2g}"
    lines = [
        f"{name}: out-of-fold log-loss {one.loss:.4f}, accuracy {one.accuracy:.2%}"
        for name, one in zip(names, (linear, hidden), strict=True)
    ]
    kept = "the linear one" if found.candidates[0].lr is None else "the one with a hidden layer"
    sample = f", compared on a sample of {SAMPLE:,}" if len(found.entries) > SAMPLE else ""
    sample += f" and trained on one of {MOST:,}" if len(found.entries) > MOST else ""
    tried = f"{len(found.candidates)} heads tried by {FOLDS} folds of {len(found.entries):,} images{sample}"
    kept += ", on features divided by their common spread" * common
    return "\n".join([*lines, f"{tried}: kept {kept}"])


def write_out_of_fold(path: Path, found: Found | None) -> None:
    """Write `paths`, `labels` and out-of-fold `probabilities` of the training and validation images (`.npz`).

    Without a search there are no rows.
    """
    entries, probabilities = [], np.empty((0, 0))
    if found is not None:
        entries = found.entries
        probabilities = objective.probabilities(found.logits.double(), found.temperature).numpy()
    content = io.BytesIO()
    paths, labels = [entry.path for entry in entries], [entry.label for entry in entries]
    np.savez(content, paths=np.array(paths, np.str_), labels=np.array(labels, np.int64), probabilities=probabilities)
    write_bytes(path, content.getbuffer())
