"""The network: a torchvision backbone and a new head; which parts are frozen and trained."""

import copy
from collections.abc import Iterable
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common.cli import StageError, is_out_of_memory
from stages.common.params import Head
from stages.network.backbones import ClassToken, cut_into_blocks

POOLING = (nn.AdaptiveAvgPool2d, ClassToken)


class Standardize(nn.Module):
    """Standardizes features (n, d) by the `mean` and `spread`, (d,), of the training images.

    One learning rate and one grid of penalties then suit the features of every backbone. Both are buffers, which no
    optimizer changes.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, mean: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)

    def forward(self, features: Tensor) -> Tensor:
        """Return the standardized features."""
        return (features - self.mean) / self.spread


class Network(nn.Module):
    """A backbone of blocks and a classifier: images (n, 3, height, width) -> logits (n, outputs).

    `block_names` are torchvision's.

    BatchNorm stays in evaluation mode in either mode of the network, and so does every block without a trainable
    parameter: `train()` would make frozen layers use the statistics of the batch again
    (https://github.com/pytorch/pytorch/issues/66073).
    """

    def __init__(self, backbone: nn.Sequential, classifier: nn.Sequential, block_names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.block_names = block_names

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.classifier(self.backbone(images))
        return logits

    def train(self, mode: bool = True) -> "Network":
        """Set training mode for trained blocks, except their BatchNorm."""
        super().train(mode)
        for block in self.backbone:
            if not any(parameter.requires_grad for parameter in block.parameters()):
                block.eval()
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def build_network(
    stock: nn.Module, head: Head, hidden: int, outputs: int, image_size: int, standardized: bool = False
) -> Network:
    """Give a stock model a new head.

    `pooled`: a head on the mean over space; `flatten`: one on all values at all positions. Of tokens, both take the
    class token, like the network's own head. Both end in hidden -> ReLU -> outputs, or are linear.

    Args:
        stock: the model, whose parts are reused.
        head: as above; `original` is the model's own classifier with another last layer.
        hidden: units of the hidden layer of `flatten` and `pooled`; 0 for a linear head.
        outputs: number of logits.
        image_size: height and width of the images, pixels.
        standardized: the head begins with `Standardize`, whose values are set later.

    Raises:
        StageError: the images are too small for the backbone.
    """
    parts = cut_into_blocks(stock)
    backbone = nn.Sequential(*parts.blocks.values())
    names = tuple(parts.blocks)
    if head == "original":
        return Network(backbone, nn.Sequential(*_with_outputs(parts.head, outputs)), names)
    features = _probe(backbone, image_size)
    if features.dim() == 3:
        reduce: list[nn.Module] = [ClassToken()]
    else:
        reduce = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if head == "pooled" else [nn.Flatten()]
    inputs = nn.Sequential(*reduce)(features).shape[1]
    if standardized:
        reduce.append(Standardize(torch.zeros(inputs), torch.ones(inputs)))
    if hidden:
        reduce += [nn.Linear(inputs, hidden), nn.ReLU()]
    return Network(backbone, nn.Sequential(*reduce, nn.Linear(hidden or inputs, outputs)), names)


def _probe(backbone: nn.Sequential, image_size: int) -> Tensor:
    """Return the features of one image on the `meta` device, which has only their shape."""
    try:
        with torch.no_grad():
            features: Tensor = (
                copy.deepcopy(backbone).to("meta").eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
            )
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise StageError(f"model.image_size: {image_size} is too small for this network; use a larger one") from error
    return features


def _with_outputs(layers: list[nn.Module], outputs: int) -> list[nn.Module]:
    """Replace the last layer with weights; drop a ReLU after it, since logits may be negative (SqueezeNet)."""
    *_, position = (number for number, layer in enumerate(layers) if isinstance(layer, nn.Linear | nn.Conv2d))
    last, after = layers[position], layers[position + 1 :]
    new: nn.Module
    if isinstance(last, nn.Conv2d):
        new = nn.Conv2d(last.in_channels, outputs, kernel_size=1)
    else:
        assert isinstance(last, nn.Linear)
        new = nn.Linear(last.in_features, outputs)
    return [*layers[:position], new, *(layer for layer in after if not isinstance(layer, nn.ReLU))]


def calibrate_batchnorm(network: Network, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of a network with random weights to their mean over batches of images.

    A new BatchNorm has a mean of 0 and a variance of 1. In evaluation mode, in which the backbone is used here, the
    activations of a random network would then fade from block to block.
    """
    layers = [module for module in network.backbone.modules() if isinstance(module, _BatchNorm)]
    network.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
        layer.train()
    with torch.no_grad():
        for images in batches:
            network.backbone(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.eval()


def require_blocks(network: Network, unfreeze: int) -> None:
    """Raise StageError if `unfreeze` is below 0 or above the number of blocks."""
    blocks = len(network.backbone)
    if not 0 <= unfreeze <= blocks:
        raise StageError(f"finetune.unfreeze: should be from 0 to {blocks}, the blocks of this network, is {unfreeze}")


def set_trainable(network: Network, unfreeze: int) -> None:
    """Make trainable the classifier and the last `unfreeze` blocks but for their BatchNorm; freeze the rest.

    Freezing BatchNorm takes two steps: its affine parameters here, its statistics by evaluation mode in `Network.train`
    (https://github.com/open-mmlab/mmdetection/issues/346).
    """
    require_blocks(network, unfreeze)
    blocks = len(network.backbone)
    network.requires_grad_(False)
    network.classifier.requires_grad_(True)
    # Not [-unfreeze:], which is all blocks for 0.
    network.backbone[blocks - unfreeze :].requires_grad_(True)
    for module in network.backbone.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)


def describe_untrained(network: Network, unfreeze: int) -> str | None:
    """Name those of the last `unfreeze` blocks that have nothing to train, as DenseNet's last; `None` if all have."""
    names = network.block_names or tuple(map(str, range(len(network.backbone))))
    blocks = list(zip(names, network.backbone, strict=True))[len(network.backbone) - unfreeze :]
    without = [name for name, block in blocks if not any(tensor.requires_grad for tensor in block.parameters())]
    if not without:
        return None
    return f"finetune.unfreeze: nothing is trained in {', '.join(without)}: it has only BatchNorm, which stays frozen"


def cut(network: Network, unfreeze: int) -> tuple[nn.Sequential, Network]:
    """Cut a network before its last `unfreeze` blocks into a frozen prefix and a trained tail, which share its tensors.

    If no block is trained, pooling at the beginning of the classifier moves into the prefix: of maps of 7 x 7 values,
    one in 49 has to be stored.
    """
    first = len(network.backbone) - unfreeze
    prefix, classifier = network.backbone[:first], network.classifier
    if not unfreeze and (pooling := _leading_pooling(classifier)):
        *blocks, last = prefix
        prefix, classifier = nn.Sequential(*blocks, nn.Sequential(last, *pooling)), classifier[len(pooling) :]
    return prefix, Network(network.backbone[first:], classifier)


def _leading_pooling(classifier: nn.Sequential) -> list[nn.Module]:
    """Return the layers before the first that is trained or random, if they include pooling."""
    layers = list(takewhile(lambda layer: isinstance(layer, (*POOLING, nn.Flatten)), classifier))
    return layers if any(isinstance(layer, POOLING) for layer in layers) else []


def count_shared_blocks(network: Network, other: Network) -> int:
    """Return the number of first blocks that are bit-identical in two networks of one architecture."""
    count = 0
    for block, twin in zip(network.backbone, other.backbone, strict=True):
        twins = twin.state_dict()
        if not all(torch.equal(tensor, twins[key]) for key, tensor in block.state_dict().items()):
            break
        count += 1
    return count
