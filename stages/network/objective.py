"""From logits to a loss and to probabilities, for two classes and for many."""

import torch
from torch import Tensor
from torch.nn import functional


def outputs_for(classes: int) -> int:
    """Return the number of logits: one for two classes, else one a class."""
    return 1 if classes == 2 else classes


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean log-loss of logits (n, outputs) for labels (n,): binary for one output, else cross-entropy."""
    if logits.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
    return functional.cross_entropy(logits, labels)


def probabilities(logits: Tensor) -> Tensor:
    """Return the probability of each class, (n, classes), for logits (n, outputs); one output is the logit of class 1.

    Both columns of two classes come from the logit: 1 - p would round a small probability to 0, its loss to infinity.
    """
    if logits.shape[1] == 1:
        return torch.sigmoid(torch.cat([-logits, logits], dim=1))
    return torch.softmax(logits, dim=1)
