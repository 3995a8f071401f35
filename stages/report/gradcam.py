"""Grad-CAM: where in an image the evidence for a class lies."""

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional

from stages.network.backbones import ClassToken
from stages.network.network import Network

# A heat map with fewer rows and columns is too coarse.
_LEAST = 7


def find_block(network: Network, size: int) -> int | None:
    """Return the number of the last block whose maps have 7 x 7 values or more, `None` if there is none."""
    features, found = torch.empty(1, 3, size, size, device="meta"), None
    # The last two blocks of a network of tokens are its last attention layer, after which only the class token counts,
    # and a LayerNorm.
    with_maps = len(network.backbone) - 2 * isinstance(network.classifier[0], ClassToken)
    with torch.no_grad():
        for number, block in enumerate(copy.deepcopy(network.backbone[:with_maps]).to("meta").eval()):
            features = block(features)
            if _as_maps(features).shape[-1] >= _LEAST:
                found = number
    return found


def grad_cam(network: Network, images: Tensor, classes: Tensor, block: int) -> Tensor:
    """Return heat maps, (n, rows, columns) in [0, 1]: 1 where the evidence for the class is strongest in its image.

    The output maps of a block, each channel weighted by the mean gradient of the class's logit; negative values are set
    to 0 (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391). All 0 without evidence for the class.

    `network` is in evaluation mode, on the CPU; `images` are preprocessed, (n, 3, height, width). With one output,
    class 1 raises the logit and class 0 lowers it. `block` is what `find_block` returns.
    """
    with torch.no_grad():
        found = network.backbone[: block + 1](images)
    with torch.enable_grad():
        # A leaf: gradients end here, and the blocks before need none.
        found.requires_grad_()
        logits = network.classifier(network.backbone[block + 1 :](found))
        if logits.shape[1] == 1:
            logits = torch.cat([-logits, logits], dim=1)
        (gradients,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), found)
    maps, gradients = _as_maps(found.detach()), _as_maps(gradients)
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    heat = functional.relu((weights * maps).sum(dim=1))
    peaks = heat.amax(dim=(1, 2), keepdim=True)
    return heat / torch.where(peaks > 0, peaks, torch.ones_like(peaks))


def _as_maps(features: Tensor) -> Tensor:
    """Return a block's output as square maps, (n, channels, rows, columns).

    Tokens are (n, 1 + rows * columns, channels), and Swin's blocks have their channels last.
    """
    if features.dim() == 3:
        patches = features[:, 1:]
        side = math.isqrt(patches.shape[1])
        return patches.transpose(1, 2).reshape(len(patches), -1, side, side)
    return features if features.shape[2] == features.shape[3] else features.permute(0, 3, 1, 2)


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Smooth heat maps (n, rows, columns) up to (n, size, size), pixels."""
    return functional.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
