"""Logits -> loss and probabilities, for two classes and for more."""

import unicodedata
from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional

from stages.common.cli import StageError
from stages.common.format import enumerate_names
from stages.common.params import ClassWeights
from stages.images.index import Entry, class_names


def outputs_for(classes: int) -> int:
    """Return the number of logits: one for two classes, otherwise one per class."""
    return 1 if classes == 2 else classes


def loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean log-loss of logits (n, outputs), nats: binary for one output, else cross-entropy.

    `class_weights`, (classes,): factors of the images' losses. The sum is divided by n, not by the sum of weights as in
    torch's losses, which would cancel the weight in a batch with one image of a rare class. `label_smoothing`, in
    [0, 1): the part of each target that is spread evenly over all classes
    (https://arxiv.org/abs/1512.00567).
    """
    if class_weights is not None:
        return losses(logits, labels, class_weights, label_smoothing).mean()
    return _reduce(logits, labels, label_smoothing, "mean")


def losses(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of each image, (n,); arguments as for `loss`, which is their mean."""
    each = _reduce(logits, labels, label_smoothing, "none")
    return each if class_weights is None else each * class_weights[labels]


def _reduce(logits: Tensor, labels: Tensor, label_smoothing: float, reduction: str) -> Tensor:
    if logits.shape[1] > 1:
        return functional.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
    targets = labels.to(logits.dtype)
    if label_smoothing:
        targets = targets * (1 - label_smoothing) + label_smoothing / 2
    return functional.binary_cross_entropy_with_logits(logits[:, 0], targets, reduction=reduction)


def weigh_classes(setting: ClassWeights, train: list[Entry]) -> Tensor | None:
    """Return, and print, the weight of each class in the loss, (classes,); the mean over the training images is 1.

    `balanced`: the inverse of the class's number of images; by name: in these proportions. Raises StageError if a class
    has no weight, or a weight no class.
    """
    if setting is None:
        return None
    names = class_names(train)
    counts = Counter(entry.class_name for entry in train)
    if setting == "balanced":
        given = {name: 1 / counts[name] for name in names}
    else:
        # macOS stores file names in another Unicode form than keyboards produce.
        spelt = {unicodedata.normalize("NFC", name): name for name in names}
        given = {spelt.get(unicodedata.normalize("NFC", name), name): weight for name, weight in setting.items()}
    if missing := [name for name in names if name not in given]:
        raise StageError(f"class_weights: no weight for {', '.join(missing)}; each class needs one")
    if unknown := [name for name in given if name not in counts]:
        raise StageError(f"class_weights: no class is named {', '.join(unknown)}; there are {', '.join(names)}")
    weights = torch.tensor([given[name] for name in names], dtype=torch.float64)
    shares = torch.tensor([counts[name] / len(train) for name in names], dtype=torch.float64)
    scaled = (weights / (weights * shares).sum()).float()
    print(
        f"class weights: {enumerate_names([f'{name} {x:.3g}' for name, x in zip(names, scaled.tolist(), strict=True)])}"
    )
    return scaled


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the probability of each class, (n, classes), for logits (n, outputs); one output is the logit of class 1.

    Logits are divided by `temperature` first (`training.temperature`). With two classes, both columns come from the
    logit: 1 - p would round a small probability to 0, and its loss to infinity.
    """
    logits = logits / temperature
    if logits.shape[1] == 1:
        return torch.sigmoid(torch.cat([-logits, logits], dim=1))
    return torch.softmax(logits, dim=1)
