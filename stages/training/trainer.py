"""Training and evaluating a network."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torcheval.metrics import BinaryAccuracy, Mean, Metric, MulticlassAccuracy
from tqdm import tqdm

from stages.common.device import autocast
from stages.common.params import Phase, Precision
from stages.common.seeds import random_state, set_random_state
from stages.common.stage import StageError
from stages.network import objective
from stages.network.network import Network
from stages.training.activations import Inputs
from stages.training.fusion import fuse_for_training
from stages.training.history import Epoch
from stages.training.resume import State, StateFile


@dataclass(frozen=True)
class Scores:
    """Means over the pictures of one pass: the log-loss, and the fraction that is classified rightly."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Fit:
    """How a training ended: the epoch whose weights the network now has, and what cut it short, if anything."""

    selected: Epoch
    failure: str | None


class Trainer:
    """Trains what `set_trainable` left trainable in a network or in the tail of one, and evaluates it.

    Args:
        network: moved to `device`; its frozen tensors and all of BatchNorm are never changed.
        device: where to compute.
        precision: in what.
    """

    def __init__(self, network: Network, device: torch.device, precision: Precision = "float32") -> None:
        self.device, self.precision = device, precision
        # In channels-last, oneDNN trains depthwise convolutions three times as fast. A head alone begins with
        # flattening, which undoes it.
        self._layout = torch.channels_last if len(network.backbone) else torch.contiguous_format
        self.network = network.to(device).to(memory_format=self._layout)
        self._fused = fuse_for_training(self.network, device, precision)

    def fit(
        self,
        train: Inputs,
        val: Inputs,
        phase: Phase,
        on_epoch: Callable[[Epoch], None],
        state: StateFile | None = None,
    ) -> Fit:
        """Train for `phase.epochs`, or until the validation loss has not fallen for `phase.patience` epochs.

        Adam with amsgrad (https://openreview.net/forum?id=ryQu7f-RZ), over the trainable tensors alone: a frozen one
        that is given to an optimizer may move by weight decay or by an old gradient. At the end the network has the
        weights of the epoch with the lowest validation loss, or of the last one, as `phase.select` says.

        Args:
            train: the training pictures.
            val: the pictures to watch.
            phase: how to train.
            on_epoch: called after each epoch, and for each one that a stopped run had finished.
            state: where a stopped run goes on from.

        Raises:
            StageError: the loss is not finite before one epoch was finished. Later, `Fit.failure` says so, and the
                network has the weights selected so far.
        """
        trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=phase.lr, weight_decay=phase.weight_decay, amsgrad=True, fused=True)
        print(f"training {sum(map(Tensor.numel, trainable)):,} parameters in {len(trainable)} tensors", flush=True)
        epochs: list[Epoch] = []
        weights: list[Tensor] = []
        failure: str | None = None
        if state is not None and (stopped := state.load()) is not None:
            epochs = stopped.epochs
            _copy_into(trainable, stopped.weights)
            weights = stopped.weights if stopped.selected is None else stopped.selected
            optimizer.load_state_dict(stopped.optimizer)
            set_random_state(stopped.random, self.device)
            print(f"going on after epoch {len(epochs)} of a run that was stopped", flush=True)
            for epoch in epochs:
                on_epoch(epoch)
        while len(epochs) < phase.epochs and not _out_of_patience(epochs, phase.patience):
            try:
                epoch = self._run_epoch(train, val, optimizer, len(epochs) + 1, phase.epochs)
            except NonFiniteLossError as error:
                failure = f"{error}; most likely lr is too high (now {phase.lr:g}): lower it"
                break
            epochs.append(epoch)
            on_epoch(epoch)
            selected = _select(epochs, phase.select)
            if epoch is selected:
                weights = [parameter.detach().clone() for parameter in trainable]
            if state is not None and len(epochs) < phase.epochs:
                now = [parameter.detach() for parameter in trainable]
                earlier = None if epoch is selected else weights
                state.save(State(epochs, now, earlier, optimizer.state_dict(), random_state(self.device)))
        if not epochs:
            raise StageError(f"{failure}; no epoch was finished, nothing is kept")
        _copy_into(trainable, weights)
        return Fit(_select(epochs, phase.select), failure)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits, (n, outputs), float32, in evaluation mode."""
        self._fused.eval()
        with torch.inference_mode():
            return self._forward(inputs)

    def features_and_logits(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what enters the classifier, (n, channels, rows, columns), and the logits as `logits` does."""
        self._fused.eval()
        with torch.inference_mode(), autocast(self.device, self.precision):
            features = self._fused.backbone(inputs.to(self.device, memory_format=self._layout))
            logits: Tensor = self._fused.classifier(features)
        return features, logits.float()

    def evaluate(self, batches: Inputs) -> Scores:
        """Return the scores over all of `batches`."""
        loss, accuracy = Mean(device=self.device), _make_accuracy(self.network, self.device)
        for inputs, labels in batches:
            logits, labels = self.logits(inputs), labels.to(self.device)
            loss.update(objective.loss(logits, labels), weight=len(labels))
            accuracy.update(*_as_accuracy_expects(logits, labels))
        return Scores(loss.compute().item(), accuracy.compute().item())

    def _run_epoch(
        self, train: Inputs, val: Inputs, optimizer: torch.optim.Optimizer, number: int, epochs: int
    ) -> Epoch:
        title = f"epoch {number}/{epochs}"
        # Not around the batches: a bar that its own iteration has ended shows no results any more.
        with tqdm(total=len(train), desc=title, unit="batch", disable=None) as progress:
            training = self._train_one_epoch(train, optimizer, number, progress.update)
            scores = self.evaluate(val)
            _require_finite(scores.loss, f"the validation loss after epoch {number}")
            epoch = Epoch(number, training.loss, training.accuracy, scores.loss, scores.accuracy)
            results = f"train_loss {epoch.train_loss:.4f}  val_loss {epoch.val_loss:.4f}  accuracy {epoch.accuracy:.2%}"
            progress.set_postfix_str(results)
        if not sys.stderr.isatty():
            print(f"{title}  {results}", flush=True)
        return epoch

    def _train_one_epoch(
        self, batches: Inputs, optimizer: torch.optim.Optimizer, number: int, on_step: Callable[[], object]
    ) -> Scores:
        self._fused.train()
        batches.set_epoch(number)
        mean, accuracy = Mean(device=self.device), _make_accuracy(self.network, self.device)
        for step, (inputs, labels) in enumerate(batches, start=1):
            logits, labels = self._forward(inputs), labels.to(self.device)
            loss = objective.loss(logits, labels)
            _require_finite(loss.item(), f"the training loss at step {step} of epoch {number}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            mean.update(loss.detach(), weight=len(labels))
            accuracy.update(*_as_accuracy_expects(logits.detach(), labels))
            on_step()
        return Scores(mean.compute().item(), accuracy.compute().item())

    def _forward(self, inputs: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            logits: Tensor = self._fused(inputs.to(self.device, memory_format=self._layout))
        return logits.float()


class NonFiniteLossError(Exception):
    """A loss is infinite or not a number. The message says which."""


def _select(epochs: list[Epoch], select: str) -> Epoch:
    """Return the last epoch, or the first of those with the lowest validation loss."""
    return epochs[-1] if select == "last" else min(epochs, key=lambda epoch: epoch.val_loss)


def _out_of_patience(epochs: list[Epoch], patience: int | None) -> bool:
    return bool(epochs) and patience is not None and len(epochs) - _select(epochs, "best").number >= patience


def _copy_into(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _require_finite(loss: float, which: str) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"{which} is {loss}")


def predict(
    trainers: Sequence[Trainer], batches: Inputs, on_features: Callable[[Tensor], object] = lambda _: None
) -> list[Tensor]:
    """Predict with several networks in one pass over the pictures.

    Args:
        trainers: of the networks.
        batches: the pictures.
        on_features: called with what enters the first network's classifier, (n, channels, rows, columns), per batch.

    Returns:
        The probability of each class for each picture, by each network: (n, classes), float64, on the CPU.
    """
    probabilities: list[list[Tensor]] = [[] for _ in trainers]
    for inputs, _ in batches:
        for number, (own, trainer) in enumerate(zip(probabilities, trainers, strict=True)):
            features, logits = trainer.features_and_logits(inputs)
            own.append(objective.probabilities(logits.cpu().double()))
            if number == 0:
                on_features(features)
    return [torch.cat(own) for own in probabilities]


def _make_accuracy(network: Network, device: torch.device) -> Metric[Tensor]:
    outputs = network.classifier[-1].out_features
    return BinaryAccuracy(device=device) if outputs == 1 else MulticlassAccuracy(device=device)


def _as_accuracy_expects(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # BinaryAccuracy compares what it is given with 0.5: that has to be a probability, not a logit.
    probabilities = objective.probabilities(logits)
    return (probabilities[:, 1] if logits.shape[1] == 1 else probabilities), labels
