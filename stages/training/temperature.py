"""Temperature scaling: probabilities that are right as often as they say (Guo et al. 2017, arXiv:1706.04599)."""

import math

import torch
from torch import Tensor

from stages.network import objective
from stages.training import parallel
from stages.training.inputs import Inputs
from stages.training.trainer import Trainer

# Of the normal prior of log T, whose mean is 0: 95% of it lies between 0.38 and 2.7.
_PRIOR_DEVIATION = 0.5
_LOWEST, _HIGHEST = 0.05, 20.0


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T > 0 by which to divide logits, so that their probabilities have the lowest log-loss.

    It is what maximizes the posterior under a log-normal prior that counts as much as a few pictures. Without it, a few
    validation pictures that are all classified correctly would have T go to 0 and make the network infinitely sure.

    Args:
        logits: (n, outputs) of pictures on which the network was not trained.
        labels: (n,).
    """
    # 0.2 s, which only the ends of the two phases should take.
    from scipy.optimize import minimize_scalar

    exact, targets = logits.double(), labels.to(logits.device)

    def cost(log_temperature: float) -> float:
        prior = 0.5 * (log_temperature / _PRIOR_DEVIATION) ** 2
        return len(targets) * float(objective.loss(exact / math.exp(log_temperature), targets)) + prior

    bounds = (math.log(_LOWEST), math.log(_HIGHEST))
    # One minimum: the loss is convex in 1 / T, and the prior in log T.
    return math.exp(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def measure_temperature(trainer: Trainer, val: Inputs) -> float:
    """Return `fit_temperature` of a trained network on validation pictures, and print what it changes there."""
    own = [(trainer.logits(inputs).cpu(), labels.cpu()) for inputs, labels, *_ in val if len(labels)]
    logits, targets = (parallel.interleave(torch.cat(each) if each else None) for each in zip(*own, strict=True))
    logits = logits.double()
    temperature = fit_temperature(logits, targets)
    before, after = (float(objective.loss(logits / divisor, targets)) for divisor in (1.0, temperature))
    print(f"temperature {temperature:.3f}: log-loss on the validation pictures {before:.4f} -> {after:.4f}")
    return temperature
