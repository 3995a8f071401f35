"""What is known after each epoch of training. By itself, so that drawing a history does not need torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """One line of the history.

    `number` counts from 1; losses are mean log-losses in nats; `val_loss` and `accuracy`, in [0, 1], are those on the
    watched pictures.
    """

    number: int
    train_loss: float
    val_loss: float
    accuracy: float
