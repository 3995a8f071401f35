"""The network: a torchvision backbone and a new head; what is frozen and what is trained."""

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import get_model, list_models

from stages.common.params import Head
from stages.common.stage import StageError, is_out_of_memory


class Network(nn.Module):
    """A backbone of blocks and a classifier: images (n, 3, height, width) -> logits (n, outputs).

    BatchNorm stays in evaluation mode whatever mode the network is in, and so does every block without a trainable
    parameter: `train()` would switch the statistics of frozen layers back to the batch's
    (https://github.com/pytorch/pytorch/issues/66073).
    """

    def __init__(self, backbone: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.classifier(self.backbone(images))
        return logits

    def train(self, mode: bool = True) -> "Network":
        """Put all that is trained into training mode, except BatchNorm."""
        super().train(mode)
        for block in self.backbone:
            if not any(parameter.requires_grad for parameter in block.parameters()):
                block.eval()
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def stock_model(arch: str) -> nn.Module:
    """Make torchvision's own model with random weights.

    Raises:
        StageError: no such classifier in torchvision (naming the near ones), or one whose blocks are not in a
            Sequential `features` before a `classifier`.
    """
    names = [name for name in list_models() if "." not in name and "/" not in name]
    if arch not in names:
        near = difflib.get_close_matches(arch, names, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "see torchvision.models.list_models()"
        raise StageError(f"model.arch: {arch!r} is not in torchvision; {advice}")
    model: nn.Module = get_model(arch, weights=None)
    if not isinstance(getattr(model, "features", None), nn.Sequential) or not hasattr(model, "classifier"):
        raise StageError(
            f"model.arch: {arch} is not a Sequential `features` and a `classifier`; "
            "use a MobileNet, EfficientNet, ConvNeXt, VGG or DenseNet"
        )
    return model


def build_network(stock: nn.Module, head: Head, hidden: int, outputs: int, image_size: int) -> Network:
    """Give a stock model a new head; the head's input size is found by running the backbone once.

    Args:
        stock: as `stock_model` makes it, with or without loaded weights; its parts are taken over.
        head: `flatten` and `pooled` end in hidden -> ReLU -> outputs; `original` keeps the model's own classifier but
            for its last linear layer.
        hidden: units of the hidden layer of `flatten` and `pooled`.
        outputs: number of logits.
        image_size: height and width of the pictures, pixels.

    Raises:
        StageError: the pictures are too small for the backbone, or `original` does not fit the model.
    """
    backbone = stock.features
    assert isinstance(backbone, nn.Sequential)
    # A random picture, from a generator of its own so that the head's initial values do not depend on the probe.
    probe = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            features: Tensor = backbone.eval()(probe)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise StageError(f"model.image_size: {image_size} is too small for this network; use a larger one") from error
    if head == "original":
        return Network(backbone, _original_classifier(stock, probe, features, outputs))
    pool = [nn.AdaptiveAvgPool2d(1)] if head == "pooled" else []
    inputs = features.shape[1] if head == "pooled" else features[0].numel()
    layers = [nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]
    return Network(backbone, nn.Sequential(*pool, *layers))


def _original_classifier(stock: nn.Module, probe: Tensor, features: Tensor, outputs: int) -> nn.Sequential:
    layers = list(stock.classifier) if isinstance(stock.classifier, nn.Sequential) else [stock.classifier]
    pool = getattr(stock, "avgpool", nn.AdaptiveAvgPool2d(1))
    flatten = [] if any(isinstance(layer, nn.Flatten) for layer in layers) else [nn.Flatten()]
    classifier = nn.Sequential(pool, *flatten, *layers).eval()
    last = layers[-1]
    with torch.inference_mode():
        # Some models do more between blocks and classifier than pool: DenseNet's `forward` has a ReLU there.
        if not isinstance(last, nn.Linear) or not torch.equal(classifier(features), stock.eval()(probe)):
            raise StageError("model.head: original does not fit this architecture; use flatten or pooled")
    classifier[-1] = nn.Linear(last.in_features, outputs)
    return classifier


def calibrate_batchnorm(network: Network, batches: Iterable[Tensor]) -> None:
    """Give a network with random weights running statistics that fit it: the mean of those of `batches`.

    A new BatchNorm claims a mean of 0 and a variance of 1. In evaluation mode, as the backbone is used here, that lets
    the activations of a random network fade from block to block until the head sees next to nothing.

    Args:
        network: changed in place: buffers of BatchNorm only.
        batches: images, each (n, 3, height, width) with n > 1, on the network's device.
    """
    layers = [module for module in network.backbone.modules() if isinstance(module, _BatchNorm)]
    network.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
        layer.train()
    with torch.no_grad():
        for images in batches:
            network.backbone(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.eval()


def require_blocks(network: Network, unfreeze: int) -> None:
    """Refuse an `unfreeze` below 0 or above the number of blocks with a `StageError`."""
    blocks = len(network.backbone)
    if not 0 <= unfreeze <= blocks:
        raise StageError(f"finetune.unfreeze: should be from 0 to {blocks}, the blocks of this network, is {unfreeze}")


def set_trainable(network: Network, unfreeze: int) -> None:
    """Make trainable the classifier and the last `unfreeze` blocks but for their BatchNorm; freeze the rest.

    Freezing BatchNorm takes two steps: its affine parameters here, its statistics by evaluation mode in `Network.train`
    (https://github.com/open-mmlab/mmdetection/issues/346).

    Args:
        network: changed in place.
        unfreeze: blocks, from 0 (head phase) to all of the backbone's.

    Raises:
        StageError: `unfreeze` is out of that range.
    """
    require_blocks(network, unfreeze)
    blocks = len(network.backbone)
    network.requires_grad_(False)
    network.classifier.requires_grad_(True)
    # Not [-unfreeze:], which is everything for 0.
    network.backbone[blocks - unfreeze :].requires_grad_(True)
    for module in network.backbone.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)


def cut(network: Network, unfreeze: int) -> tuple[nn.Sequential, Network]:
    """Cut a network before its last `unfreeze` blocks: what is frozen, and what is trained.

    Returns:
        The prefix: images -> activations; and the tail: activations -> logits. Both share the network's tensors.
    """
    first = len(network.backbone) - unfreeze
    return network.backbone[:first], Network(network.backbone[first:], network.classifier)


def count_shared_blocks(network: Network, other: Network) -> int:
    """Return how many blocks, from the first on, are bit-identical in two networks of one architecture."""
    count = 0
    for block, twin in zip(network.backbone, other.backbone, strict=True):
        twins = twin.state_dict()
        if not all(torch.equal(tensor, twins[key]) for key, tensor in block.state_dict().items()):
            break
        count += 1
    return count
