"""Grad-CAM: where in a picture the evidence for a class lies."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.network.network import Network


def grad_cam(network: Network, images: Tensor, classes: Tensor) -> Tensor:
    """Return heat maps, (n, rows, columns) in [0, 1]: 1 where the evidence for the class is strongest in its picture.

    The outputs of the backbone's last block, each channel weighted by the mean gradient of the class's logit with
    respect to it; what speaks against the class is cut off (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391).
    A map is as coarse as that block's output. All 0 where nothing speaks for the class.

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

    hook = network.backbone[-1].register_forward_hook(catch)
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
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    heat = functional.relu((weights * caught[0].detach()).sum(dim=1))
    peaks = heat.amax(dim=(1, 2), keepdim=True)
    return heat / torch.where(peaks > 0, peaks, torch.ones_like(peaks))


def enlarge(maps: Tensor, size: int) -> Tensor:
    """Smooth heat maps (n, rows, columns) up to (n, size, size), pixels."""
    return functional.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
