"""Training and evaluating a network."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torcheval.metrics import BinaryAccuracy, Metric, MulticlassAccuracy
from torcheval.metrics.toolkit import sync_and_compute
from tqdm import tqdm

from stages.common import ranks
from stages.common.cli import StageError
from stages.common.device import autocast, random_state, set_random_state
from stages.common.params import Phase, Precision
from stages.images.index import Groups
from stages.network import objective
from stages.network.network import Network
from stages.network.objective import Losses, Scores, score_logits
from stages.training.batches import Batches, Part, interleave
from stages.training.history import Epoch, best_epoch, out_of_patience
from stages.training.kernels import fuse_for_training
from stages.training.line import ALPHAS, Point, choose
from stages.training.optimizer import make_optimizer, schedule_rate, trainable_parameters
from stages.training.resume import State, StateFile

# Steps between checks of the losses: each check makes a GPU wait.
_CHECKED = 50


@dataclass(frozen=True)
class Fit:
    """How a training ended.

    `selected` is the one of `epochs` whose weights the network now has. With `select: line`, `line` has the measured
    points, and the weights are those of `point`; `selected` is then epoch 0 or the last one. `failure`: what cut the
    training short, or `None`; `start_competed`: epoch 0 could be selected.
    """

    epochs: list[Epoch]
    selected: Epoch
    failure: str | None = None
    start_competed: bool = False
    line: tuple[Point, ...] = ()
    point: Point | None = None


class Trainer:
    """Trains what `set_trainable` left trainable in a network or in the tail of one, and evaluates it.

    Frozen tensors and all of BatchNorm never change. `class_weights`, as for `objective.loss`, apply to training and
    validation loss. `tempered`: the validation loss is measured after a temperature fitted to the same images, like the
    probabilities that will be served; otherwise on the raw logits.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        precision: Precision = "float32",
        class_weights: Tensor | None = None,
        tempered: bool = True,
    ) -> None:
        self.device, self.precision, self.tempered = device, precision, tempered
        self.class_weights = None if class_weights is None else class_weights.to(device)
        # oneDNN trains depthwise convolutions three times as fast in channels-last. A head alone begins by flattening,
        # which undoes it.
        self._layout = torch.channels_last if len(network.backbone) else torch.contiguous_format
        self.network = network.to(device).to(memory_format=self._layout)
        self._fused = fuse_for_training(self.network, device, precision)
        self._trained: nn.Module = self._fused

    def fit(
        self,
        train: Batches,
        val: Batches,
        phase: Phase,
        on_epoch: Callable[[Epoch], None],
        state: StateFile | None = None,
        keep_start: bool = False,
        layer_decay: float = 1.0,
        groups: Groups | None = None,
    ) -> Fit:
        """Train for `phase.epochs`, or until the validation loss has not fallen for `phase.patience` epochs.

        At the end the network has the weights that `phase.select` asks for: of the epoch with the lowest validation
        loss, of the last one, or of the point between start and end that `line.choose` keeps.

        Args:
            train: batches of the training images.
            val: batches of the watched images.
            phase: how to train.
            on_epoch: called for epoch 0, before training, and for each epoch, including those of a resumed run.
            state: where a stopped run resumes.
            keep_start: with `select: best`, epoch 0 competes and patience counts from it. On a line it is one end.
            layer_decay: as for `make_optimizer`.
            groups: of the watched images, as for `line.choose`.

        Raises:
            StageError: the loss is not finite before there is an epoch to keep. After that, `Fit.failure` says so, and
                the network has the weights selected so far.
        """
        trainable = trainable_parameters(self.network)
        start = _copy_of(trainable) if phase.select == "line" else []
        optimizer = make_optimizer(self.network, phase, layer_decay)
        # Averages the gradients of all ranks.
        self._trained = (
            DistributedDataParallel(self._fused, forward_sync_buffers=False) if ranks.joined() else self._fused
        )
        print(f"training {sum(map(Tensor.numel, trainable)):,} parameters in {len(trainable)} tensors", flush=True)
        stopped = None if state is None else state.load()
        epochs = [self._look_at_start(val)] if stopped is None else stopped.epochs
        weights = _copy_of(trainable) if stopped is None else self._resume(stopped, optimizer)
        for epoch in epochs:
            on_epoch(epoch)
        failure, first = None, 0 if keep_start else 1
        schedule = schedule_rate(optimizer, phase, phase.epochs * len(train), epochs[-1].number * len(train))
        while epochs[-1].number < phase.epochs and not out_of_patience(epochs[first:], phase.patience):
            try:
                epoch = self._run_epoch(train, val, phase, optimizer, schedule, epochs[-1].number + 1)
            except NonFiniteLossError as error:
                failure = f"{error}; most likely lr is too high (now {phase.lr:g}): lower it"
                break
            epochs.append(epoch)
            on_epoch(epoch)
            selected = _select(epochs[first:], phase.select)
            if epoch is selected:
                weights = _copy_of(trainable)
            if state is not None and epoch.number < phase.epochs:
                now = [parameter.detach() for parameter in trainable]
                earlier = None if epoch is selected else weights
                random = ranks.gather(random_state(self.device))
                state.save(State(epochs, now, earlier, optimizer.state_dict(), random))
        if phase.select == "line":
            if failure is None:
                return self._go_back(epochs, start, val, groups)
            _copy_into(trainable, start)
            return Fit(epochs, epochs[0], failure, start_competed=True)
        candidates = epochs[first:] if phase.select == "best" else epochs[1:]
        if not candidates:
            raise StageError(f"{failure}; no epoch was finished, nothing is kept")
        _copy_into(trainable, weights)
        competed = keep_start and phase.select == "best"
        return Fit(epochs, _select(candidates, phase.select), failure, competed)

    def _resume(self, stopped: State, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        _copy_into(trainable_parameters(self.network), stopped.weights)
        optimizer.load_state_dict(stopped.optimizer)
        set_random_state(stopped.random[ranks.rank()], self.device)
        print(f"resuming after epoch {stopped.epochs[-1].number}", flush=True)
        return stopped.weights if stopped.selected is None else stopped.selected

    def _go_back(self, epochs: list[Epoch], start: list[Tensor], val: Batches, groups: Groups | None) -> Fit:
        """Measure the line from the start to the current weights, and keep the point that `line.choose` selects."""
        trainable = trainable_parameters(self.network)
        end = _copy_of(trainable)

        def move_to(alpha: float) -> None:  # both ends are exact
            pairs = zip(start, end, strict=True)
            between = [torch.lerp(first, last, alpha) for first, last in pairs] if 0 < alpha < 1 else []
            _copy_into(trainable, between or (end if alpha else start))

        points, losses = [], []
        for alpha in ALPHAS:
            move_to(alpha)
            scores, each = self._score(*self._predict(val))
            points.append(Point(alpha, scores.loss, scores.accuracy, scores.temperature))
            losses.append(each)
        point = points[ranks.agree(choose(losses, groups))]
        move_to(point.alpha)
        return Fit(epochs, epochs[-1] if point.alpha else epochs[0], None, True, tuple(points), point)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits, (n, outputs), float32, in evaluation mode."""
        self._fused.eval()
        with torch.inference_mode():
            return self._forward(inputs, self._fused)

    @property
    def _outputs(self) -> int:
        *_, last = (parameter for parameter in self.network.classifier.parameters() if parameter.dim() > 1)
        return len(last)

    def evaluate(self, batches: Batches) -> Scores:
        """Return the scores over all batches."""
        return self._score(*self._predict(batches))[0]

    def _predict(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """Return the logits, (n, outputs), float32, and the labels, (n,), of all images of all ranks."""
        own = [(self.logits(inputs).cpu(), labels.cpu()) for inputs, labels, *_ in batches if len(labels)]
        columns = [[row[column] for row in own] for column in (0, 1)]
        logits, labels = (interleave(torch.cat(rows) if rows else None) for rows in columns)
        return logits, labels

    def _score(self, logits: Tensor, labels: Tensor) -> tuple[Scores, Losses]:
        return score_logits(logits, labels, self.class_weights, self.tempered)

    def step(self, part: Part, optimizer: torch.optim.Optimizer, phase: Phase) -> tuple[Tensor, Tensor]:
        """Take one optimizer step on a batch; return the loss and the logits of this rank's part, from before the step.

        Uses `label_smoothing`, `mixup` and `clip_norm`, the largest norm of all gradients together, of `phase`.
        """
        self._trained.train()
        inputs, labels = part.inputs, part.labels.to(self.device)
        others, share = labels, 1.0
        if phase.mixup:
            inputs, others, share = mix(part, phase.mixup)
        every = self._forward(inputs, self._trained)
        logits = every[: len(labels)]

        def loss_for(truth: Tensor) -> Tensor:
            return objective.loss(logits, truth, self.class_weights, phase.label_smoothing)

        loss = loss_for(labels) if len(labels) else every.sum()
        if share < 1 and len(labels):
            loss = share * loss + (1 - share) * loss_for(others)
        optimizer.zero_grad()
        # The mean over the ranks is then that of the whole batch.
        weighted = loss * (len(labels) * ranks.count() / part.whole)
        weighted.backward()  # type: ignore[no-untyped-call]
        if phase.clip_norm is not None:
            nn.utils.clip_grad_norm_(trainable_parameters(self.network), phase.clip_norm)
        optimizer.step()
        return loss.detach(), logits.detach()

    def _look_at_start(self, val: Batches) -> Epoch:
        scores = self.evaluate(val)
        if not math.isfinite(scores.loss):
            raise StageError(f"the validation loss before the first epoch is {scores.loss}: check the weights")
        print(f"start  val_loss {scores.loss:.4f}  accuracy {scores.accuracy:.2%}", flush=True)
        return Epoch(0, None, None, scores.loss, scores.accuracy, scores.temperature)

    def _run_epoch(
        self,
        train: Batches,
        val: Batches,
        phase: Phase,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        number: int,
    ) -> Epoch:
        title, started = f"epoch {number}/{phase.epochs}", time.monotonic()
        # Not around the batches: once its own iteration ends, a bar shows no more results.
        with tqdm(total=len(train), desc=title, unit="batch", disable=None) as progress:
            result = _Pass(self.device, self._outputs)
            train.set_epoch(number)
            for step, part in enumerate(train, start=1):
                loss, logits = self.step(part, optimizer, phase)
                schedule.step()
                result.add(loss, logits, part.labels.to(self.device), part.whole)
                progress.update()
                if step % _CHECKED == 0 or step == len(train):
                    result.require_finite(f"of epoch {number}")
            training = result.scores()
            scores = self.evaluate(val)
            _require_finite(scores.loss, f"the validation loss after epoch {number}")
            results = f"train_loss {training.loss:.4f}  val_loss {scores.loss:.4f}  accuracy {scores.accuracy:.2%}"
            progress.set_postfix_str(results)
        if not sys.stderr.isatty():
            seconds = time.monotonic() - started
            ahead = phase.epochs - number
            left = f", at most {ahead * seconds:.0f} s left" * (ahead > 0)
            print(f"{title}  {results}  {seconds:.1f} s{left}", flush=True)
        return Epoch(number, training.loss, training.accuracy, scores.loss, scores.accuracy, scores.temperature)

    def _forward(self, inputs: Tensor, network: nn.Module) -> Tensor:
        with autocast(self.device, self.precision):
            # Only maps have this layout, not tokens.
            layout = self._layout if inputs.dim() == 4 else torch.contiguous_format
            logits: Tensor = network(inputs.to(self.device, memory_format=layout))
        return logits.float()


def mix(part: Part, alpha: float) -> tuple[Tensor, Tensor, float]:
    """Mix each input with another one of the batch, as mixup does (Zhang et al. 2018, https://arxiv.org/abs/1710.09412).

    Cached activations are mixed like images: manifold mixup (Verma et al. 2019, https://arxiv.org/abs/1806.05236). Each
    rank mixes its own images with those of all ranks.

    Returns:
        The mixed inputs, the labels of the other images, (n,), and the share of the first ones, in [0.5, 1], from
        Beta(alpha, alpha).
    """
    # From the CPU's generator, whose state a stopped run restores.
    drawn = float(torch.distributions.Beta(alpha, alpha).sample())
    share, order = ranks.agree((max(drawn, 1 - drawn), torch.randperm(part.whole)))
    count = len(part.labels)
    inputs, labels = _join_parts(part.inputs[:count], part.labels, part.places)
    if not count:
        return part.inputs, part.labels, share
    chosen = order[list(part.places)]
    others = inputs[chosen.to(inputs.device)]
    return torch.lerp(others, part.inputs, share), labels[chosen.to(labels.device)].to(part.labels.device), share


def _join_parts(inputs: Tensor, labels: Tensor, places: range) -> tuple[Tensor, Tensor]:
    """Return the inputs, (n, ...), and the labels of a whole batch, of which each rank has its `places`."""
    if not ranks.joined():
        return inputs, labels
    parts = [part for part in ranks.gather((inputs.cpu(), labels.cpu(), places)) if len(part[2])]
    every, theirs, spread = zip(*parts, strict=True)
    order = torch.tensor([place for own in spread for place in own]).argsort()
    return torch.cat(every)[order].to(inputs.device), torch.cat(theirs)[order].to(labels.device)


class _Pass:
    """Sums over the batches of one pass, on the device: reading them at each batch would make a GPU wait."""

    def __init__(self, device: torch.device, outputs: int) -> None:
        kind = BinaryAccuracy if outputs == 1 else MulticlassAccuracy
        self._accuracy: Metric[Tensor] = kind(device=device)
        self._device = device
        self._losses: list[Tensor] = []
        self._counts: list[int] = []
        self._checked = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, whole: int) -> None:
        """Take this rank's n images, perhaps 0, of a batch of `whole`: mean loss, logits (n, outputs), labels (n,)."""
        self._counts.append(whole)
        self._losses.append(len(labels) * loss if len(labels) else torch.zeros((), device=self._device))
        if len(labels):
            # BinaryAccuracy has a threshold of 0.5, so it needs probabilities, not logits.
            probabilities = objective.probabilities(logits)
            self._accuracy.update(probabilities[:, 1] if logits.shape[1] == 1 else probabilities, labels)

    def scores(self) -> Scores:
        """Return the means over all images of all ranks, at least one."""
        total = 0.0  # Python's: some devices have no 64-bit floats
        for value in ranks.add_up(torch.stack(self._losses)).tolist():
            total += value
        accuracy = sync_and_compute(self._accuracy) if ranks.joined() else self._accuracy.compute()
        return Scores(total / sum(self._counts), accuracy.item())

    def require_finite(self, when: str) -> None:
        """Raise `NonFiniteLossError` if one of the losses since the last call is not."""
        losses = ranks.add_up(torch.stack(self._losses[self._checked :]))
        for step, value in enumerate(losses.tolist(), start=self._checked + 1):
            _require_finite(value, f"the training loss at step {step} {when}")
        self._checked = len(self._losses)


class NonFiniteLossError(Exception):
    """A loss is infinite or not a number. The message says which."""


def _select(epochs: list[Epoch], select: str) -> Epoch:
    return epochs[-1] if select == "last" else best_epoch(epochs)


def _copy_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _copy_into(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _require_finite(loss: float, which: str) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"{which} is {loss}")


def predict(trainers: Sequence[Trainer], batches: Batches) -> list[Tensor]:
    """Return the logits of several networks, (n, outputs), float64, on the CPU, in one pass over the images."""
    outputs: list[list[Tensor]] = [[] for _ in trainers]
    for inputs, labels, *_ in batches:
        if len(labels):
            for own, trainer in zip(outputs, trainers, strict=True):
                own.append(trainer.logits(inputs).cpu().double())
    return [interleave(torch.cat(own) if own else None) for own in outputs]
