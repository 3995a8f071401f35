"""Grad-CAM: where in a picture the evidence for a class lies."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.network.backbones import ClassToken
from stages.network.network import Network


def grad_cam(network: Network, images: Tensor, classes: Tensor) -> Tensor:
    """Return heat maps, (n, rows, columns) in [0, 1]: 1 where the evidence for the class is strongest in its picture.

    The maps that leave the backbone, each channel weighted by the mean gradient of the class's logit with respect to
    it; what speaks against the class is cut off (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391). Of a network
    of tokens, those of patches that enter its last layer of attention: behind it, only the class token counts. A heat
    map is as coarse as these maps. All 0 where nothing speaks for the class.

    Args:
        network: in evaluation mode, float32, on the CPU.
        images: (n, 3, height, width), preprocessed.
        classes: (n,), the class to explain in each picture; of one output, 1 is what raises the logit, 0 what lowers
            it.
    """
    caught: list[Tensor] = []

    def catch(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # A leaf of its own: gradients end here, and no part of the backbone needs any.
        caught.append(output.detach().requires_grad_())
        return caught[-1]

    tokens = isinstance(network.classifier[0], ClassToken)
    # The last two blocks of a network of tokens are its last layer of attention and a LayerNorm.
    hook = network.backbone[-3 if tokens else -1].register_forward_hook(catch)
    try:
        with torch.enable_grad():
            logits = network(images)
            if logits.shape[1] == 1:
                chosen = torch.where(classes == 1, logits[:, 0], -logits[:, 0])
            else:
                chosen = logits.gather(1, classes[:, None])[:, 0]
            (gradients,) = torch.autograd.grad(chosen.sum(), caught)
    finally:
        hook.remove()
    maps = caught[0].detach()
    if tokens:
        maps, gradients = (_patches_as_maps(values) for values in (maps, gradients))
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    heat = functional.relu((weights * maps).sum(dim=1))
    peaks = heat.amax(dim=(1, 2), keepdim=True)
    return heat / torch.where(peaks > 0, peaks, torch.ones_like(peaks))


def _patches_as_maps(tokens: Tensor) -> Tensor:
    """(n, 1 + rows * columns, channels) -> (n, channels, rows, columns), as many rows as columns."""
    patches = tokens[:, 1:]
    side = math.isqrt(patches.shape[1])
    return patches.transpose(1, 2).reshape(len(patches), -1, side, side)


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Smooth heat maps (n, rows, columns) up to (n, size, size), pixels."""
    return functional.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
