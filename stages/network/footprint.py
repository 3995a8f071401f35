"""How much memory pictures take on their way through frozen blocks."""

import copy

import torch
from torch import Tensor, nn


def widest_layer(blocks: nn.Sequential, image_size: int) -> int:
    """Return the most bytes that one layer reads and writes for one picture, in float32 and without autograd.

    Args:
        blocks: of a backbone, from the first on; nothing is computed but shapes.
        image_size: height and width of the pictures, pixels.
    """
    most = 3 * image_size * image_size * 4

    def measure(_: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        nonlocal most
        written = outputs.nbytes if isinstance(outputs, Tensor) else 0
        most = max(most, written + sum(tensor.nbytes for tensor in inputs if isinstance(tensor, Tensor)))

    shapes = copy.deepcopy(blocks).to("meta").eval()
    for module in shapes.modules():
        # An activation may write where it reads.
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(measure)
    with torch.no_grad():
        shapes(torch.empty(1, 3, image_size, image_size, device="meta"))
    return most
