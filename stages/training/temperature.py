"""Temperature scaling: probabilities that are right as often as they say (Guo et al. 2017, arXiv:1706.04599)."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torcheval.metrics.functional import binary_accuracy, multiclass_accuracy

from stages.network import objective

Losses = NDArray[np.float64]

# Of the normal prior of log T, whose mean is 0: 95% of it lies between 0.38 and 2.7.
_PRIOR_DEVIATION = 0.5
_LOWEST, _HIGHEST = 0.05, 20.0


@dataclass(frozen=True)
class Scores:
    """Of some images: the mean log-loss, after division by `temperature`, and the fraction classified correctly."""

    loss: float
    accuracy: float
    temperature: float = 1.0


def score_logits(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, tempered: bool = True
) -> tuple[Scores, Losses]:
    """Return the scores of logits, (n, outputs), on the CPU, and the loss of each image, infinite where one is not.

    `tempered`: a temperature is fitted to the images first.
    """
    # BinaryAccuracy compares what it is given with 0.5: that has to be a probability, not a logit.
    probabilities = objective.probabilities(logits)
    two = logits.shape[1] == 1
    accuracy = binary_accuracy(probabilities[:, 1], labels) if two else multiclass_accuracy(probabilities, labels)
    if not logits.isfinite().all():
        return Scores(math.inf, float(accuracy)), np.full(len(labels), math.inf)
    temperature = fit_temperature(logits, labels, class_weights) if tempered else 1.0
    losses = tempered_losses(logits, labels, temperature, class_weights)
    return Scores(float(losses.mean()), float(accuracy), temperature), losses


def fit_temperature(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> float:
    """Return the temperature T > 0 by which to divide logits, so that their probabilities have the lowest log-loss.

    It is what maximizes the posterior under a log-normal prior that counts as much as a few images. Without it, a few
    validation images that are all classified correctly would have T go to 0 and make the network infinitely sure. The
    logits, (n, outputs), finite, on the CPU, are of images on which the network was not trained.
    """
    # 0.2 s, which `--help` should not take.
    from scipy.optimize import minimize_scalar

    def cost(log_temperature: float) -> float:
        prior = 0.5 * (log_temperature / _PRIOR_DEVIATION) ** 2
        return float(tempered_losses(logits, labels, math.exp(log_temperature), class_weights).sum()) + prior

    bounds = (math.log(_LOWEST), math.log(_HIGHEST))
    # One minimum: the loss is convex in 1 / T, and the prior in log T.
    return math.exp(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def tempered_losses(logits: Tensor, labels: Tensor, temperature: float, class_weights: Tensor | None = None) -> Losses:
    """Return the log-loss of each image, nats, (n,), once its logits are divided by `temperature`.

    In NumPy, since torch's Apple devices have no floats of 64 bits. Arguments as for `fit_temperature`.
    """
    values, true = np.asarray(logits, dtype=np.float64), labels.numpy()
    if values.shape[1] == 1:
        values = np.concatenate([np.zeros_like(values), values], axis=1)
    values = values / temperature
    values -= values.max(axis=1, keepdims=True)
    losses: Losses = np.log(np.exp(values).sum(axis=1)) - values[np.arange(len(true)), true]
    return losses if class_weights is None else losses * class_weights.cpu().numpy()[true]
