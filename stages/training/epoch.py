"""What is known after each epoch of training. By itself, so that drawing a history does not need torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """One line of the history.

    `number` counts from 1; losses are mean log-losses in nats, accuracies are fractions. `val_loss` and `accuracy` are
    those on the watched pictures; the training's are means over the epoch, while the weights were changing.
    """

    number: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    accuracy: float
