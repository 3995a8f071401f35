"""What is known after each epoch of training. By itself, so that drawing a history does not need torch."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """One line of the history.

    `number` counts from 1; epoch 0 is the network as the phase found it, without a training loss. Losses are mean
    log-losses in nats (both weighted by `class_weights`, the training's also smoothed by `label_smoothing`), accuracies
    are fractions. `val_loss` and `accuracy` are those on the watched pictures; the training's are means over the epoch,
    while the weights were changing.
    """

    number: int
    train_loss: float | None
    train_accuracy: float | None
    val_loss: float
    accuracy: float


def best_epoch(epochs: Sequence[Epoch]) -> Epoch:
    """Return the first of the epochs with the lowest validation loss."""
    return min(epochs, key=lambda epoch: epoch.val_loss)


def out_of_patience(epochs: Sequence[Epoch], patience: int | None) -> bool:
    """Say whether the validation loss has not been lower for `patience` epochs; never without a patience."""
    return bool(epochs) and patience is not None and epochs[-1].number - best_epoch(epochs).number >= patience


def still_falling(epochs: Sequence[Epoch], limit: int, patience: int | None) -> bool:
    """Say whether a phase was ended by its number of epochs, `limit`, before its validation loss stopped falling.

    It has stopped when it has not been lower for `patience` epochs; without a patience, for one.
    """
    trained = [epoch for epoch in epochs if epoch.number > 0]
    return len(trained) == limit and not out_of_patience(trained, patience or 1)
