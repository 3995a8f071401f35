"""Which learning rate a phase can bear: a short training in which the rate rises from step to step.

The learning rate range test (Smith 2015, https://arxiv.org/abs/1506.01186).
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from stages.common.params import Phase
from stages.common.stage import StageError
from stages.network import objective
from stages.training.inputs import Inputs, Part
from stages.training.optimizer import make_optimizer
from stages.training.trainer import Trainer

# From a rate at which nothing moves to the largest that `params.yaml` takes.
_LOWEST, _HIGHEST, _STEPS = 1e-7, 1.0, 100
# Weight of the past in the smoothed loss: it remembers ten steps, seven tenths of a decade.
_MEMORY = 0.9
_EXPLOSION = 4.0
# A fall of less than this fraction of the loss is none.
_LEAST_FALL = 0.05
# A fall that is not this many times as large as the rises before it and in it is chance.
_CHANCE = 1.5
# Of a fall, the first and the last such fraction do not count.
_MARGIN = 0.1
# Nats. Keeps the ratio of two losses finite where a network is certain of every picture.
_TINY = 1e-9


@dataclass(frozen=True)
class Sweep:
    """What a sweep saw, a value a step.

    `rates` rise evenly on a logarithmic scale; `raw` is the loss of each step's batch, nats, before the step; `losses`
    is the smoothed one. Where it `exploded` the sweep ended: its last loss may be infinite or not a number.
    """

    rates: list[float]
    raw: list[float]
    losses: list[float]
    exploded: bool


@dataclass(frozen=True)
class Valley:
    """A stretch of falling loss: its first and last rate, and the one to take."""

    first: float
    last: float
    suggestion: float


def sweep_rates(trainer: Trainer, train: Inputs, phase: Phase, layer_decay: float = 1.0) -> Sweep:
    """Train for 100 steps while the rate rises from 1e-7 to 1, or until the smoothed loss is 4 times its lowest.

    How hard a batch happens to be says nothing about the rate, but it moves the loss of a trained head more than
    anything else. So each batch is also given to the network as it was. The smoothed loss is the ratio of both, each
    exponentially smoothed (the correction of the bias cancels), times the mean loss of the network as it was.

    Args:
        trainer: its network is trained, and not good for anything afterwards.
        train: the training pictures; gone through as often as it takes.
        phase: all but the rate and its course.
        layer_decay: as for `make_optimizer`; the rates are the head's, the blocks' keep their proportion to it.

    Raises:
        StageError: the loss is not finite at the first step.
    """
    before = Trainer(copy.deepcopy(trainer.network), trainer.device, trainer.precision, trainer.class_weights)
    # At a rate of 1 each group's is its share.
    optimizer = make_optimizer(trainer.network, phase.model_copy(update={"lr": 1.0}), layer_decay)
    shares = [group["lr"] for group in optimizer.param_groups]
    raw: list[float] = []
    references: list[float] = []
    ratios: list[float] = []
    exploded = False
    smooth = smooth_reference = 0.0
    rates = [_LOWEST * (_HIGHEST / _LOWEST) ** (step / (_STEPS - 1)) for step in range(_STEPS)]
    with tqdm(total=_STEPS, desc="rates", unit="step", disable=None) as progress:
        for rate, part in zip(rates, _endless(train), strict=False):
            labels = part.labels.to(trainer.device)
            reference = objective.loss(before.logits(part.inputs), labels, trainer.class_weights, phase.label_smoothing)
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share
            loss, _ = trainer.step(part, optimizer, phase)
            raw.append(loss.item())
            references.append(reference.item())
            smooth += (1 - _MEMORY) * (raw[-1] - smooth)
            smooth_reference += (1 - _MEMORY) * (references[-1] - smooth_reference)
            ratios.append((smooth + _TINY) / (smooth_reference + _TINY))
            progress.update()
            exploded = not ratios[-1] <= _EXPLOSION * min(ratios)
            if exploded:
                break
    if not math.isfinite(raw[0]):
        raise StageError(f"the training loss at the first step is {raw[0]}: check the weights")
    level = sum(references) / len(references)
    return Sweep(rates[: len(raw)], raw, [level * ratio for ratio in ratios], exploded)


def _endless(train: Inputs) -> Iterator[Part]:
    epoch = 0
    while True:
        epoch += 1
        train.set_epoch(epoch)
        yield from train


def valley(rates: Sequence[float], losses: Sequence[float]) -> Valley | None:
    """Find the longest falling stretch of a smoothed loss, and the rate two thirds into it on the logarithmic scale.

    The stretch is the longest chain of steps each of whose losses is lower than the one before in the chain, so that it
    goes on past a small rise, as in fastai's suggestion of the same name. The first and the last tenth of the fall do
    not count: a rate far too low lets the loss fall too, a little, and at the bottom it may creep on. How many such
    rates were tried must not move the suggestion.

    Args:
        rates: rising.
        losses: as many, above 0; what is infinite or not a number is in no stretch.

    Returns:
        `None` where the loss falls by less than a twentieth, or not clearly by more than it rose before or meanwhile:
        then it goes up and down by chance.
    """
    chain = _longest_fall(losses)
    if not chain:
        return None
    top, bottom = losses[chain[0]], losses[chain[-1]]
    if top - bottom <= max(_LEAST_FALL * top, _CHANCE * _largest_rise(losses[: chain[-1] + 1])):
        return None
    margin = _MARGIN * (top - bottom)
    first = rates[max(step for step in chain if losses[step] >= top - margin)]
    last = rates[min(step for step in chain if losses[step] <= bottom + margin)]
    return Valley(first, last, first * (last / first) ** (2 / 3))


def _longest_fall(losses: Sequence[float]) -> list[int]:
    """Return the steps of the longest strictly falling subsequence; of several, the one that ends lowest."""
    length: dict[int, int] = {}
    previous: dict[int, int] = {}
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            continue
        higher = [earlier for earlier in length if losses[earlier] > loss]
        best = max(higher, key=lambda earlier: length[earlier], default=None)
        length[step] = 1 if best is None else length[best] + 1
        if best is not None:
            previous[step] = best
    if not length:
        return []
    chain = [max(length, key=lambda step: (length[step], -losses[step]))]
    while chain[-1] in previous:
        chain.append(previous[chain[-1]])
    return chain[::-1]


def _largest_rise(losses: Sequence[float]) -> float:
    lowest, rise = math.inf, 0.0
    for loss in losses:
        lowest = min(lowest, loss)
        rise = max(rise, loss - lowest)
    return rise


def advise(phase: str, sweep: Sweep, found: Valley | None) -> str:
    """Say in one line which rate to try, or why there is none and what to do then.

    Args:
        phase: `train_head` or `finetune`.
        sweep: what was seen.
        found: its valley.
    """
    if found is not None:
        return f"suggestion: dvc exp run -S {phase}.lr={found.suggestion:.1e}"
    keep = f"keep lr well below {sweep.rates[-1]:.1e}, where it explodes" if sweep.exploded else "leave lr as it is"
    way_out = (
        "what is trained has learnt these pictures; train more blocks (-S finetune.unfreeze=...)"
        if phase == "finetune"
        else "check the labels and model.weights"
    )
    return f"no suggestion: no rate lowers the training loss, {sweep.losses[0]:.2g} nats; {way_out}, or {keep}"
