"""Temperature scaling, for calibrated probabilities (Guo et al. 2017, arXiv:1706.04599)."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torcheval.metrics.functional import binary_accuracy, multiclass_accuracy

from stages.network import objective

Losses = NDArray[np.float64]

# Of the normal prior of log T, with mean 0: 95% of it lies between 0.38 and 2.7.
_PRIOR_DEVIATION = 0.5
_LOWEST, _HIGHEST = 0.05, 20.0


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
    probabilities = objective.probabilities(logits)
    two = logits.shape[1] == 1
    accuracy = binary_accuracy(probabilities[:, 1], labels) if two else multiclass_accuracy(probabilities, labels)
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
