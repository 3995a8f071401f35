"""Faster training and prediction: the same network in fewer and cheaper steps."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from stages.common.params import Precision

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def fold_batchnorm(module: AnyModule) -> AnyModule:
    """Return a module that computes the same in fewer steps and shares its parameters and buffers with `module`.

    In a Sequential, a convolution right before a BatchNorm absorbs it. BatchNorm has to be frozen and in evaluation
    mode, as `Network` keeps it. Training the result trains `module`. Outputs of single layers change: fold the modules
    on both sides of a looked-at output separately.
    """
    shared = [*module.parameters(), *module.buffers()]
    folded = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    for sequence in _sequences(folded):
        for position in range(len(sequence) - 1):
            conv, norm = sequence[position], sequence[position + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequence[position], sequence[position + 1] = _FoldedConv2d(conv, norm), nn.Identity()
    return folded


def fuse_for_training(module: AnyModule, device: torch.device, precision: Precision) -> AnyModule:
    """Return a module that trains the same parameters in fewer and cheaper steps; BatchNorm as for `fold_batchnorm`."""
    fused = fold_batchnorm(module)
    for child in fused.modules():
        # Their gradients need the input, unlike ReLU's, so autograd would copy it before an in-place step.
        if isinstance(child, nn.Hardswish | nn.Hardsigmoid | nn.SiLU):
            child.inplace = False
    if device.type == "cpu" and precision == "bfloat16":
        for sequence in _sequences(fused):
            for position, layer in enumerate(sequence):
                if isinstance(layer, _FoldedConv2d) and layer.conv.groups > 1:
                    sequence[position] = _InFloat32(layer)
    return fused


def _sequences(module: nn.Module) -> list[nn.Sequential]:
    return [child for child in module.modules() if isinstance(child, nn.Sequential)]


class _FoldedConv2d(nn.Module):
    """A convolution with the frozen BatchNorm after it folded in: BatchNorm in evaluation mode is affine.

    The convolution keeps its parameters, so an optimizer trains them through the fold.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = conv
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.detach() * torch.rsqrt(norm.running_var + norm.eps)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", norm.bias.detach() - norm.running_mean * scale)

    def forward(self, images: Tensor) -> Tensor:
        bias = self.shift if self.conv.bias is None else self.shift + self.scale * self.conv.bias
        weight = self.conv.weight * self.scale.view(-1, 1, 1, 1)
        folded: Tensor = self.conv._conv_forward(images, weight, bias)
        return folded


class _InFloat32(nn.Module):
    """A layer that computes in float32 under autocast: oneDNN trains depthwise convolutions faster so."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            outputs: Tensor = self.layer(inputs.float())
            return outputs
