"""The families of torchvision's classifiers: how each is cut into blocks and a head.

A block, the unit that `finetune.unfreeze` counts, is a family's smallest unit, such as a residual block, an encoder
layer, or a convolution with its normalization and activation. The last block returns maps (n, channels, rows, columns),
or tokens (n, 1 + patches, channels) of which the first is the class token.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, list_models
from torchvision.models.convnext import CNBlock
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.mnasnet import _InvertedResidual
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.squeezenet import Fire
from torchvision.models.swin_transformer import SwinTransformerBlock, SwinTransformerBlockV2

from stages.common.cli import StageError
from stages.images.preprocessing import Preprocessing

_Model = Any  # torchvision has no types


@dataclass(frozen=True)
class Parts:
    """A stock model in parts: images -> `blocks` in order -> features -> `head` -> logits of its own classes.

    `blocks` have torchvision's names, those of several layers the first one's. Other parts of the stock model, such as
    auxiliary classifiers, are not used. `features`: torchvision's name of the last block's output
    (`torchvision.models.feature_extraction`), or of the class token.
    """

    blocks: dict[str, nn.Module]
    head: list[nn.Module]
    features: str = "features"


class ClassToken(nn.Module):
    """Tokens (n, 1 + patches, channels) -> the class token, (n, channels)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the first token."""
        return tokens[:, 0]


class Patches(nn.Module):
    """A vision transformer's first block: images (n, 3, size, size) -> tokens with positions."""

    def __init__(self, stock: _Model) -> None:
        super().__init__()
        self.conv_proj, self.class_token = stock.conv_proj, stock.class_token
        self.pos_embedding, self.dropout = stock.encoder.pos_embedding, stock.encoder.dropout

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens, (n, 1 + patches, channels)."""
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], dim=1)
        dropped: Tensor = self.dropout(tokens + self.pos_embedding)
        return dropped


def cut_into_blocks(stock: nn.Module) -> Parts:
    """Cut a stock model into parts that share its modules."""
    return _FAMILIES[type(stock).__name__](stock)


def _alexnet(stock: _Model) -> Parts:  # also VGG
    blocks = _grouped(stock.features, "features", lambda layer: isinstance(layer, nn.Conv2d))
    return Parts(blocks, [stock.avgpool, nn.Flatten(), *stock.classifier])


def _convnext(stock: _Model) -> Parts:
    return Parts(_units(stock.features, "features", CNBlock), [stock.avgpool, *stock.classifier])


def _densenet(stock: _Model) -> Parts:
    stem, (*stages, norm) = stock.features[:4], list(stock.features.named_children())[4:]
    last = nn.Sequential(norm[1], nn.ReLU(inplace=True))  # the ReLU is in torchvision's `forward`
    blocks = {f"features.{name}": stage for name, stage in stages}
    blocks = {"features.conv0": stem, **blocks, f"features.{norm[0]}": last}
    return Parts(blocks, [nn.AdaptiveAvgPool2d(1), nn.Flatten(), stock.classifier], "relu")


def _efficientnet(stock: _Model) -> Parts:
    blocks = _units(stock.features, "features", MBConv, FusedMBConv)
    return Parts(blocks, [stock.avgpool, nn.Flatten(), *stock.classifier])


def _googlenet(stock: _Model) -> Parts:  # the auxiliary classifiers are left out
    blocks = {
        "conv1": nn.Sequential(stock.conv1, stock.maxpool1),
        "conv2": stock.conv2,
        "conv3": nn.Sequential(stock.conv3, stock.maxpool2),
        "inception3a": stock.inception3a,
        "inception3b": nn.Sequential(stock.inception3b, stock.maxpool3),
        "inception4a": stock.inception4a,
        "inception4b": stock.inception4b,
        "inception4c": stock.inception4c,
        "inception4d": stock.inception4d,
        "inception4e": nn.Sequential(stock.inception4e, stock.maxpool4),
        "inception5a": stock.inception5a,
        "inception5b": stock.inception5b,
    }
    return Parts(blocks, [stock.avgpool, nn.Flatten(), stock.dropout, stock.fc], "inception5b")


def _inception(stock: _Model) -> Parts:  # the auxiliary classifier is left out
    names = [name for name, _ in stock.named_children() if name.startswith(("Conv2d_", "Mixed_"))]
    blocks = {name: getattr(stock, name) for name in names}
    blocks["Conv2d_2b_3x3"] = nn.Sequential(stock.Conv2d_2b_3x3, stock.maxpool1)
    blocks["Conv2d_4a_3x3"] = nn.Sequential(stock.Conv2d_4a_3x3, stock.maxpool2)
    return Parts(blocks, [stock.avgpool, stock.dropout, nn.Flatten(), stock.fc], "Mixed_7c")


def _maxvit(stock: _Model) -> Parts:
    layers = {
        f"blocks.{block}.layers.{name}": layer
        for block, stage in enumerate(stock.blocks)
        for name, layer in stage.layers.named_children()
    }
    return Parts({"stem": stock.stem, **layers}, list(stock.classifier), "blocks")


def _mnasnet(stock: _Model) -> Parts:
    stem, last = stock.layers[:8], stock.layers[14:]
    blocks = {
        name: unit
        for name, unit in _units(stock.layers, "layers", _InvertedResidual).items()
        if isinstance(unit, _InvertedResidual)
    }
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *stock.classifier]
    return Parts({"layers.0": stem, **blocks, "layers.14": last}, head, "layers")


def _mobilenet(stock: _Model) -> Parts:
    blocks = {f"features.{name}": block for name, block in stock.features.named_children()}
    return Parts(blocks, [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *stock.classifier])


def _regnet(stock: _Model) -> Parts:
    blocks = _units(stock.trunk_output, "trunk_output", ResBottleneckBlock)
    return Parts({"stem": stock.stem, **blocks}, [stock.avgpool, nn.Flatten(), stock.fc], "trunk_output")


def _resnet(stock: _Model) -> Parts:
    stem = nn.Sequential(stock.conv1, stock.bn1, stock.relu, stock.maxpool)
    stages = [f"layer{number}" for number in range(1, 5)]
    blocks = {f"{stage}.{name}": unit for stage in stages for name, unit in getattr(stock, stage).named_children()}
    return Parts({"conv1": stem, **blocks}, [stock.avgpool, nn.Flatten(), stock.fc], "layer4")


def _shufflenet(stock: _Model) -> Parts:
    stages = [f"stage{number}" for number in range(2, 5)]
    blocks = {f"{stage}.{name}": unit for stage in stages for name, unit in getattr(stock, stage).named_children()}
    stem = nn.Sequential(*stock.conv1, stock.maxpool)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), stock.fc]
    return Parts({"conv1": stem, **blocks, "conv5": stock.conv5}, head, "conv5")


def _squeezenet(stock: _Model) -> Parts:
    blocks = _grouped(stock.features, "features", lambda layer: isinstance(layer, nn.Conv2d | Fire))
    return Parts(blocks, [*stock.classifier, nn.Flatten()])


def _swin(stock: _Model) -> Parts:  # channels last inside, but returns maps
    blocks = _units(stock.features, "features", SwinTransformerBlock, SwinTransformerBlockV2)
    last = nn.Sequential(stock.norm, stock.permute)
    return Parts({**blocks, "norm": last}, [stock.avgpool, stock.flatten, stock.head], "permute")


def _vision_transformer(stock: _Model) -> Parts:
    layers = {f"encoder.layers.{name}": layer for name, layer in stock.encoder.layers.named_children()}
    blocks = {"conv_proj": Patches(stock), **layers, "encoder.ln": stock.encoder.ln}
    return Parts(blocks, [ClassToken(), *stock.heads], "getitem_5")


_FAMILIES: dict[str, Callable[[_Model], Parts]] = {
    "AlexNet": _alexnet,
    "ConvNeXt": _convnext,
    "DenseNet": _densenet,
    "EfficientNet": _efficientnet,
    "GoogLeNet": _googlenet,
    "Inception3": _inception,
    "MNASNet": _mnasnet,
    "MaxVit": _maxvit,
    "MobileNetV2": _mobilenet,
    "MobileNetV3": _mobilenet,
    "RegNet": _regnet,
    "ResNet": _resnet,
    "ShuffleNetV2": _shufflenet,
    "SqueezeNet": _squeezenet,
    "SwinTransformer": _swin,
    "VGG": _alexnet,
    "VisionTransformer": _vision_transformer,
}

# These were trained in TensorFlow with this normalization. torchvision normalizes as for all its weights and then
# rescales (`transform_input`); this is the same in one step.
_NORMALIZATIONS = dict.fromkeys(("googlenet", "inception_v3"), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
_SIZES = {"inception_v3": 299}


def architectures() -> list[str]:
    """Return the names of torchvision's classifiers; all can be used."""
    names: list[str] = list_models(module=torchvision.models)
    return names


def require_architecture(arch: str) -> None:
    """Raise StageError, with similar names, if torchvision has no classifier of this name."""
    if arch not in architectures():
        near = difflib.get_close_matches(arch, architectures(), n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "see torchvision.models.list_models()"
        raise StageError(f"model.arch: {arch!r} is no classifier of torchvision's; {advice}")


def own_normalization(arch: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and standard deviation of an architecture's images; `None` if its weights state them."""
    return _NORMALIZATIONS.get(arch)


def native_preprocessing(arch: str) -> Preprocessing:
    """Return the preprocessing of torchvision's weight files for an architecture, if nothing else is stated."""
    preprocessing = Preprocessing()
    mean, std = own_normalization(arch) or (preprocessing.mean, preprocessing.std)
    return replace(preprocessing, crop=_SIZES.get(arch, preprocessing.crop), mean=mean, std=std)


def stock_model(arch: str, image_size: int = 224) -> nn.Module:
    """Make torchvision's own model with random weights; raises StageError if it cannot take images of this size."""
    require_architecture(arch)
    model: nn.Module = get_model(arch, weights=None, **stock_options(arch, image_size))
    return model


def stock_options(arch: str, image_size: int) -> dict[str, Any]:
    """Return torchvision's options for a model; raises what `stock_model` does."""
    if arch in ("googlenet", "inception_v3"):
        return {"init_weights": False}  # scipy's truncated normals take half a minute
    if arch.startswith("vit_"):
        _require_multiple(arch, image_size, int(arch.rpartition("_")[2]))
        return {"image_size": image_size}
    if arch.startswith("maxvit"):
        _require_multiple(arch, image_size, 224)
        return {"input_size": (image_size, image_size)}
    return {}


def stock_shapes(arch: str, image_size: int = 224) -> nn.Module:
    """Make the same model on the `meta` device, without values, which is fast for any size."""
    if arch.startswith("regnet"):  # torchvision computes its widths with tensors
        return stock_model(arch, image_size).to("meta")
    with torch.device("meta"):
        return stock_model(arch, image_size)


def names_in_torchvision(parts: Parts, stock: nn.Module) -> dict[str, str]:
    """Return the names of the backbone's tensors in a checkpoint, `backbone.NUMBER...` -> those in `stock`."""
    original = {id(tensor): name for name, tensor in stock.state_dict(keep_vars=True).items()}
    tensors = nn.Sequential(*parts.blocks.values()).state_dict(keep_vars=True)
    return {f"backbone.{name}": original[id(tensor)] for name, tensor in tensors.items()}


def _require_multiple(arch: str, image_size: int, step: int) -> None:
    if image_size % step:
        near = max(image_size // step, 1) * step
        raise StageError(
            f"model.image_size: {arch} takes multiples of {step} pixels, is {image_size}; use {near} or {near + step}"
        )


def _grouped(layers: nn.Sequential, prefix: str, begins: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Make a block of each layer for which `begins` holds and the layers after it."""
    groups: dict[str, list[nn.Module]] = {}
    for name, layer in layers.named_children():
        if begins(layer):
            groups[f"{prefix}.{name}"] = []
        groups[list(groups)[-1]].append(layer)
    return {name: group[0] if len(group) == 1 else nn.Sequential(*group) for name, group in groups.items()}


def _units(layers: nn.Sequential, prefix: str, *kinds: type[nn.Module]) -> dict[str, nn.Module]:
    """Make a block of each unit of the given kinds, and of each layer beside the stages made of such units."""

    def unpack() -> Iterator[tuple[str, nn.Module]]:
        for name, layer in layers.named_children():
            units = list(layer.named_children())
            if all(isinstance(unit, kinds) for _, unit in units) and not isinstance(layer, kinds):
                yield from ((f"{prefix}.{name}.{number}", unit) for number, unit in units)
            else:
                yield f"{prefix}.{name}", layer

    return dict(unpack())
