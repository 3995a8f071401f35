"""Training and evaluating a network."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torcheval.metrics import BinaryAccuracy, Mean, Metric, MulticlassAccuracy
from tqdm import tqdm

from stages.common import objective
from stages.common.command import StageError
from stages.common.epoch import Epoch
from stages.common.images import Batches
from stages.common.network import Network
from stages.common.params import Phase


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
    """Trains what `set_trainable` left trainable in a network, and evaluates it.

    Args:
        network: moved to `device`; its frozen tensors and all of BatchNorm are never changed.
        device: where to compute.
    """

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network = network.to(device)
        self.device = device

    def fit(self, train: Batches, val: Batches, phase: Phase, on_epoch: Callable[[Epoch], None]) -> Fit:
        """Train for `phase.epochs`, or until the validation loss has not fallen for `phase.patience` epochs.

        Adam with amsgrad (https://openreview.net/forum?id=ryQu7f-RZ), over the trainable tensors alone: a frozen one
        that is given to an optimizer may move by weight decay or by an old gradient. At the end the network has the
        weights of the epoch with the lowest validation loss, or of the last one, as `phase.select` says.

        Args:
            train: the training pictures.
            val: the pictures to watch.
            phase: how to train.
            on_epoch: called after each epoch.

        Raises:
            StageError: the loss is not finite before one epoch was finished. Later, `Fit.failure` says so, and the
                network has the weights selected so far.
        """
        trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=phase.lr, weight_decay=phase.weight_decay, amsgrad=True)
        print(f"training {sum(map(Tensor.numel, trainable)):,} parameters in {len(trainable)} tensors", flush=True)
        lowest: Epoch | None = None
        selected: Epoch | None = None
        weights: list[Tensor] = []
        failure: str | None = None
        for number in range(1, phase.epochs + 1):
            try:
                epoch = self._run_epoch(train, val, optimizer, number, phase.epochs)
            except NonFiniteLossError as error:
                failure = f"{error}; most likely lr is too high (now {phase.lr:g}): lower it"
                break
            on_epoch(epoch)
            if lowest is None or epoch.val_loss < lowest.val_loss:
                lowest = epoch
            if epoch is lowest or phase.select == "last":
                selected, weights = epoch, [parameter.detach().clone() for parameter in trainable]
            if phase.patience is not None and number - lowest.number >= phase.patience:
                break
        if selected is None:
            raise StageError(f"{failure}; no epoch was finished, nothing is kept")
        with torch.no_grad():
            for parameter, value in zip(trainable, weights, strict=True):
                parameter.copy_(value)
        return Fit(selected, failure)

    def evaluate(self, batches: Batches) -> Scores:
        """Return the scores over all of `batches`."""
        loss, accuracy = Mean(device=self.device), _make_accuracy(self.network, self.device)
        for logits, labels in self._logits(batches):
            loss.update(objective.loss(logits, labels), weight=len(labels))
            accuracy.update(*_as_accuracy_expects(logits, labels))
        return Scores(loss.compute().item(), accuracy.compute().item())

    def predict(self, batches: Batches) -> Tensor:
        """Return the probability of each class for each picture: (n, classes), float64, on the CPU."""
        return torch.cat([objective.probabilities(logits.cpu().double()) for logits, _ in self._logits(batches)])

    def _run_epoch(
        self, train: Batches, val: Batches, optimizer: torch.optim.Optimizer, number: int, epochs: int
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
        self, batches: Batches, optimizer: torch.optim.Optimizer, number: int, on_step: Callable[[], object]
    ) -> Scores:
        self.network.train()
        mean, accuracy = Mean(device=self.device), _make_accuracy(self.network, self.device)
        for step, (images, labels) in enumerate(batches, start=1):
            images, labels = images.to(self.device), labels.to(self.device)
            logits = self.network(images)
            loss = objective.loss(logits, labels)
            _require_finite(loss.item(), f"the training loss at step {step} of epoch {number}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            mean.update(loss.detach(), weight=len(labels))
            accuracy.update(*_as_accuracy_expects(logits.detach(), labels))
            on_step()
        return Scores(mean.compute().item(), accuracy.compute().item())

    def _logits(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        self.network.eval()
        with torch.inference_mode():
            for images, labels in batches:
                yield self.network(images.to(self.device)), labels.to(self.device)


class NonFiniteLossError(Exception):
    """A loss is infinite or not a number. The message says which."""


def _require_finite(loss: float, which: str) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"{which} is {loss}")


def _make_accuracy(network: Network, device: torch.device) -> Metric[Tensor]:
    outputs = network.classifier[-1].out_features
    return BinaryAccuracy(device=device) if outputs == 1 else MulticlassAccuracy(device=device)


def _as_accuracy_expects(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # BinaryAccuracy compares what it is given with 0.5: that has to be a probability, not a logit.
    probabilities = objective.probabilities(logits)
    return (probabilities[:, 1] if logits.shape[1] == 1 else probabilities), labels
