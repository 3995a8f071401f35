"""The optimizer and its learning rate schedule."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from stages.common.params import Phase
from stages.network.network import Network

_MOMENTUM = 0.9
# Steps of a warm-up. With one step, the first epoch on 45 photos ended with 36 times the loss it began with.
LEAST_WARMUP = 10


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that `set_trainable` left trainable."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def make_optimizer(network: Network, phase: Phase, layer_decay: float = 1.0) -> torch.optim.Optimizer:
    """Make the optimizer of a phase, over the trainable tensors alone.

    An optimizer could move a frozen tensor by weight decay or an old gradient. Biases and the parameters of
    normalization layers do not decay (He et al. 2018, https://arxiv.org/abs/1812.01187). Adam is the amsgrad variant
    (https://openreview.net/forum?id=ryQu7f-RZ), SGD has a momentum of 0.9. The head learns at `phase.lr`, each block at
    the fraction `layer_decay` of the rate of the next one (BEiT, https://arxiv.org/abs/2106.08254).
    """
    groups: list[dict[str, Any]] = []
    for depth, part in enumerate([network.classifier, *reversed(network.backbone)]):
        lr, decay = phase.lr * layer_decay**depth, phase.weight_decay
        named = [(name, one) for name, one in part.named_parameters() if one.requires_grad]
        exempt = {name for name, one in named if decay and (one.dim() < 2 or "bias" in name)}
        for names, own in (({name for name, _ in named} - exempt, decay), (exempt, 0.0)):
            if parameters := [one for name, one in named if name in names]:
                groups.append({"params": parameters, "lr": lr, "weight_decay": own})
    if phase.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=_MOMENTUM)
    if phase.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.Adam(groups, amsgrad=True, fused=True)


def schedule_rate(optimizer: torch.optim.Optimizer, phase: Phase, steps: int, done: int = 0) -> LambdaLR:
    """Schedule the rate of each group by `rate_factor`; `step()` advances to the next optimizer step."""
    return LambdaLR(optimizer, lambda step: rate_factor(step, steps, phase.schedule, phase.warmup), last_epoch=done - 1)


def rate_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """Return the fraction of the full learning rate, in [0, 1], for one optimizer step.

    Args:
        step: from 0.
        steps: of the whole phase.
        schedule: `constant`, or `cosine`: half a cosine from 1 after the warm-up down to 0 after the last step
            (https://arxiv.org/abs/1608.03983).
        warmup: the fraction of `steps` in which the rate rises linearly to its full value; if above 0, at least
            `LEAST_WARMUP` steps or half of all. Adam's first steps move every weight by about the rate, whatever the
            gradient (https://arxiv.org/abs/1908.03265).
    """
    rising = max(round(warmup * steps), min(LEAST_WARMUP, steps // 2)) if warmup else 0
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2
