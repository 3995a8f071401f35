"""Predictions and a network of which one knows everything."""

import numpy as np
import torch
from torch import nn

from stages.network.network import Network
from stages.scores.calibration import Calibrations, measure_calibrations
from stages.scores.predictions import Predictions

# 90 images with a probability of 99%, all right, and 10 with 80%, half of them right.
_TOP = np.array([0.99] * 90 + [0.8] * 10)
_VALUES = np.stack([_TOP, 1 - _TOP], axis=1)
SURE = Predictions([""] * 100, np.array([0] * 95 + [1] * 5), ["cat", "dog"], _VALUES, _VALUES)


def measured(*temperatures: float) -> Calibrations:
    return measure_calibrations(SURE, temperatures, ("a", "b"), (SURE.labels, SURE.finetuned))


def looks_at_colors(outputs: int) -> Network:
    """The logit of class n is the mean of colour n; of one output, of the first colour."""
    linear = nn.Linear(3, outputs)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(3)[:outputs])
        linear.bias.zero_()
    backbone = nn.Sequential(nn.Identity(), nn.AvgPool2d(4))
    network = Network(backbone, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear))
    return network.requires_grad_(False).eval()  # as a frozen one
