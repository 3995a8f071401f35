"""Weight files of common layouts -> tensors by torchvision's names."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Keys of the tensors in files that also hold an optimizer's state or an epoch.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# Key prefixes of DataParallel and DistributedDataParallel, and of torch.compile.
_PREFIXES = ("module.", "_orig_mod.")

Tensors = dict[str, Tensor]


def unwrap(content: object) -> Tensors | None:
    """Return the tensors of a file without wrappers and key prefixes; `None` if it holds anything else."""
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        return None
    tensors = dict(content)
    while prefix := next((prefix for prefix in _PREFIXES if _all_begin_with(tensors, prefix)), None):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _all_begin_with(tensors: Mapping[str, Any], prefix: str) -> bool:
    return bool(tensors) and all(key.startswith(prefix) for key in tensors)


def to_torchvision(tensors: Tensors) -> Tensors:
    """Give tensors torchvision's names, if they have timm's and both libraries have the same network.

    ResNets have the same names in both. Unknown names are returned unchanged.
    """
    for sign, convert in _TIMM.items():
        if sign in tensors:
            return convert(tensors)
    return tensors


def whose(tensors: Tensors) -> str | None:
    """Return whose names the tensors have, if they are known and not torchvision's."""
    return next((name for sign, name in _OTHERS.items() if any(re.match(sign, key) for key in tensors)), None)


def _renamed(tensors: Tensors, rules: Mapping[str, str]) -> Tensors:
    """Rename each key by the first rule, a regular expression, that matches all of it; drop keys without a match."""
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        for pattern, replacement in rules.items():
            if match := re.fullmatch(pattern, key):
                renamed[match.expand(replacement)] = tensor
                break
    return renamed


def _vision_transformer(tensors: Tensors) -> Tensors:
    layer = r"encoder.layers.encoder_layer_\1"
    return _renamed(
        tensors,
        {
            r"cls_token": "class_token",
            r"pos_embed": "encoder.pos_embedding",
            r"patch_embed\.proj\.(.*)": r"conv_proj.\1",
            r"blocks\.(\d+)\.norm([12])\.(.*)": rf"{layer}.ln_\2.\3",
            r"blocks\.(\d+)\.attn\.qkv\.(.*)": rf"{layer}.self_attention.in_proj_\2",
            r"blocks\.(\d+)\.attn\.proj\.(.*)": rf"{layer}.self_attention.out_proj.\2",
            r"blocks\.(\d+)\.mlp\.fc1\.(.*)": rf"{layer}.mlp.0.\2",
            r"blocks\.(\d+)\.mlp\.fc2\.(.*)": rf"{layer}.mlp.3.\2",
            r"norm\.(.*)": r"encoder.ln.\1",
            r"head\.(.*)": r"heads.head.\1",
        },
    )


def _convnext(tensors: Tensors) -> Tensors:
    # torchvision numbers the stem, then stages and downsampling layers in turn: stage s is 2 s + 1.
    numbered = {
        re.sub(r"^stages\.(\d)\.(downsample|blocks)", _number_of_stage, key): tensor for key, tensor in tensors.items()
    }
    renamed = _renamed(
        numbered,
        {
            r"stem\.(.*)": r"features.0.\1",
            r"downsample\.(\d)\.(.*)": r"features.\1.\2",
            r"blocks\.(\d)\.(\d+)\.gamma": r"features.\1.\2.layer_scale",
            r"blocks\.(\d)\.(\d+)\.conv_dw\.(.*)": r"features.\1.\2.block.0.\3",
            r"blocks\.(\d)\.(\d+)\.norm\.(.*)": r"features.\1.\2.block.2.\3",
            r"blocks\.(\d)\.(\d+)\.mlp\.fc1\.(.*)": r"features.\1.\2.block.3.\3",
            r"blocks\.(\d)\.(\d+)\.mlp\.fc2\.(.*)": r"features.\1.\2.block.5.\3",
            r"head\.norm\.(.*)": r"classifier.0.\1",
            r"head\.fc\.(.*)": r"classifier.2.\1",
        },
    )
    return {key: tensor[:, None, None] if key.endswith("layer_scale") else tensor for key, tensor in renamed.items()}


def _number_of_stage(match: re.Match[str]) -> str:
    stage, what = int(match[1]), match[2]
    return f"{what}.{2 * stage + (what == 'blocks')}"


def _mobilenet_v3(tensors: Tensors) -> Tensors:
    """Number the blocks consecutively; timm's BatchNorm divides by sqrt(variance + 1e-5), torchvision's by + 1e-3."""
    blocks = sorted({(int(m[1]), int(m[2])) for key in tensors if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", key))})
    stage, block = blocks.pop()  # a convolution, not a block
    rules = {
        r"conv_stem\.(.*)": r"features.0.0.\1",
        r"bn1\.(.*)": r"features.0.1.\1",
        rf"blocks\.{stage}\.{block}\.conv\.(.*)": rf"features.{len(blocks) + 1}.0.\1",
        rf"blocks\.{stage}\.{block}\.bn1\.(.*)": rf"features.{len(blocks) + 1}.1.\1",
        r"conv_head\.(.*)": r"classifier.0.\1",
        r"classifier\.(.*)": r"classifier.3.\1",
    }
    for number, (stage, block) in enumerate(blocks, start=1):
        own = [key for key in tensors if key.startswith(f"blocks.{stage}.{block}.")]
        expands, squeezes = (any(sign in key for key in own) for sign in (".conv_pwl.", ".se."))
        depthwise, project = int(expands), int(expands) + squeezes + 1
        places = {
            "se.conv_reduce": f"{depthwise + 1}.fc1",
            "se.conv_expand": f"{depthwise + 1}.fc2",
            "conv_dw": f"{depthwise}.0",
            "conv_pwl": f"{project}.0",
            "conv_pw": f"{0 if expands else project}.0",
            "bn3": f"{project}.1",
            "bn2": f"{depthwise if expands else project}.1",
            "bn1": "0.1",
        }
        for name, place in places.items():
            source = re.escape(f"blocks.{stage}.{block}.{name}.")
            rules[f"{source}(.*)"] = rf"features.{number}.block.{place}.\1"
    renamed = _renamed(tensors, rules)
    for key in [key for key in renamed if key.endswith("running_var")]:
        weight, variance = key.replace("running_var", "weight"), renamed[key]
        renamed[weight] = renamed[weight] * torch.sqrt((variance + 1e-3) / (variance + 1e-5))
    if "classifier.0.weight" in renamed:  # a 1 x 1 convolution in timm
        renamed["classifier.0.weight"] = renamed["classifier.0.weight"].flatten(1)
    return renamed


# A key found only in timm's files -> the conversion of its family.
_TIMM: dict[str, Callable[[Tensors], Tensors]] = {
    "patch_embed.proj.weight": _vision_transformer,
    "stages.0.blocks.0.conv_dw.weight": _convnext,
    "conv_stem.weight": _mobilenet_v3,
}

# Beginnings of keys, as regular expressions -> whose files these are.
_OTHERS = {
    r"(vit|resnet|swin(v2)?|convnext|mobilenet_v2|efficientnet|regnet)\.(embe|enco)": "Hugging Face transformers'",
    r"visual\.": "CLIP's",
    r"encoder_[qk]\.": "MoCo's",
    r"backbone\.": "another project's, with a backbone inside",
    r"model\.": "PyTorch Lightning's, with a model inside",
    r"(patch_embed|conv_stem|stem|stages|blocks|layers\.\d+\.blocks|s\d|conv1\.conv)\b": "timm's",
}
