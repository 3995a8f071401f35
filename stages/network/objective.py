"""Logits -> loss and probabilities, for two classes and for more; the temperature that calibrates them."""

import math
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torcheval.metrics.functional import binary_accuracy, multiclass_accuracy

from stages.common.cli import StageError
from stages.common.format import enumerate_names
from stages.common.params import ClassWeights
from stages.images.index import Entry, class_names

Losses = NDArray[np.float64]

# Of the normal prior of log T, T the temperature, with mean 0: 95% of it lies between 0.38 and 2.7.
_PRIOR_DEVIATION = 0.5
_LOWEST, _HIGHEST = 0.05, 20.0


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

    Logits are divided by `temperature` first (Guo et al. 2017, https://arxiv.org/abs/1706.04599). With two classes,
    both columns come from the logit: 1 - p would round a small probability to 0, and its loss to infinity.
    """
    logits = logits / temperature
    if logits.shape[1] == 1:
        return torch.sigmoid(torch.cat([-logits, logits], dim=1))
    return torch.softmax(logits, dim=1)


@dataclass(frozen=True)
class Scores:
    """The mean log-loss of some images after division of the logits by `temperature`, and their accuracy."""

    loss: float
    accuracy: float
    temperature: float = 1.0


def score_logits(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, tempered: bool = True
) -> tuple[Scores, Losses]:
    """Return the scores of logits, (n, outputs), on the CPU, and the loss of each image.

    `tempered`: a temperature is fitted to the images first. If a logit is not finite, all losses are infinite.
    """
    # `binary_accuracy` has a threshold of 0.5, so it needs probabilities, not logits.
    values, two = probabilities(logits), logits.shape[1] == 1
    accuracy = binary_accuracy(values[:, 1], labels) if two else multiclass_accuracy(values, labels)
    if not logits.isfinite().all():
        return Scores(math.inf, float(accuracy)), np.full(len(labels), math.inf)
    temperature = fit_temperature(logits, labels, class_weights) if tempered else 1.0
    losses = tempered_losses(logits, labels, temperature, class_weights)
    return Scores(float(losses.mean()), float(accuracy), temperature), losses


def fit_temperature(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> float:
    """Return the temperature T > 0 that logits are divided by for the lowest log-loss.

    It maximizes the posterior under a log-normal prior that weighs as much as a few images. Without a prior, a few
    validation images that are all classified correctly would drive T to 0 and probabilities to 1. The logits,
    (n, outputs), finite, on the CPU, are of images on which the network was not trained.
    """
    # Here: the import takes 0.2 s, which would delay `--help`.
    from scipy.optimize import minimize_scalar

    def cost(log_temperature: float) -> float:
        prior = 0.5 * (log_temperature / _PRIOR_DEVIATION) ** 2
        return float(tempered_losses(logits, labels, math.exp(log_temperature), class_weights).sum()) + prior

    bounds = (math.log(_LOWEST), math.log(_HIGHEST))
    # There is one minimum: the loss is convex in 1 / T, and the prior in log T.
    return math.exp(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def tempered_losses(logits: Tensor, labels: Tensor, temperature: float, class_weights: Tensor | None = None) -> Losses:
    """Return the log-loss of each image, nats, (n,), after division of the logits by `temperature`.

    In NumPy, since Apple's GPUs have no float64. Arguments as for `fit_temperature`.
    """
    values, true = np.asarray(logits, dtype=np.float64), labels.numpy()
    if values.shape[1] == 1:
        values = np.concatenate([np.zeros_like(values), values], axis=1)
    values = values / temperature
    values -= values.max(axis=1, keepdims=True)
    losses: Losses = np.log(np.exp(values).sum(axis=1)) - values[np.arange(len(true)), true]
    return losses if class_weights is None else losses * class_weights.cpu().numpy()[true]
