"""Pretrained weights: torchvision's by name, a file, or none."""

import difflib
import hashlib
import io
import json
import pickle
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights

from stages.common.stage import StageError, is_out_of_memory
from stages.network.weight_file import weight_file
from stages.pictures.preprocessing import Preprocessing

# In a .safetensors file: a JSON object; its `preprocessing` is what the pictures went through. One key only, since
# safetensors writes several in an order that changes from run to run, and so would the file's bytes.
METADATA_KEY = "pretraining"

_DOWNLOAD_TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class Weights:
    """Tensors by torchvision's key names, and what is known about them.

    `source` is the name or the file as given; `sha256` is that of the file, or of the tensors of named weights; both
    are `None` for random weights, whose `tensors` are empty.
    """

    tensors: Mapping[str, Tensor]
    preprocessing: Preprocessing
    source: str | None
    sha256: str | None


def find_weights(arch: str, weights: str | None) -> Weights:
    """Load what `model.weights` asks for. Nothing is unpickled but tensors.

    Raises:
        StageError: an unknown name (naming the near ones), a name that needs the network where there is none, a file
            that is missing, damaged, or holds anything else than a dictionary of tensors.
    """
    if weights is None:
        return Weights({}, Preprocessing(), None, None)
    file = weight_file(weights)
    return _from_name(arch, weights) if file is None else _from_file(file)


def load_into(model: nn.Module, weights: Weights, arch: str) -> None:
    """Copy weights into a stock model: its whole backbone, and of its classifier what the file has.

    Raises:
        StageError: the weights are of another architecture.
    """
    if weights.source is None:
        return
    expected = model.state_dict()
    # Counts batches for an optional average; files older than torch 0.4.1 lack it, and nothing here reads it.
    missing = [
        key
        for key in expected
        if key.startswith("features.") and key not in weights.tensors and not key.endswith("num_batches_tracked")
    ]
    known = {key: tensor for key, tensor in weights.tensors.items() if key in expected}
    shapes = [
        key for key, tensor in known.items() if tensor.shape != expected[key].shape and key.startswith("features.")
    ]
    foreign = [key for key in weights.tensors if key.startswith("features.") and key not in expected]
    for keys, problem in ((missing, "lacks"), (shapes, "has another shape of"), (foreign, "also has")):
        if keys:
            raise StageError(
                f"model.weights: {weights.source} is not for {arch}: it {problem} {keys[0]} "
                f"({len(keys)} such tensors); set model.arch to the network that it was made for"
            )
    fitting = {key: tensor for key, tensor in known.items() if tensor.shape == expected[key].shape}
    model.load_state_dict(fitting, strict=False)


def _from_name(arch: str, name: str) -> Weights:
    enum: type[WeightsEnum] = get_model_weights(arch)
    names = ["DEFAULT", *enum.__members__]
    if name not in names:
        near = difflib.get_close_matches(name.upper(), names, n=2) or names
        raise StageError(
            f"model.weights: {arch} has no weights named {name!r}; did you mean {' or '.join(near)}? "
            "(a file is known by a / or by its extension: .pth, .safetensors)"
        )
    entry = enum[name]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        tensors = entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        reason = getattr(error, "reason", error)
        raise StageError(
            f"model.weights: cannot download {name} from {entry.url} ({reason}); fetch that file on a machine "
            "with a network and give its path as model.weights"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    tensors = {_modern_key(key): tensor for key, tensor in tensors.items()}
    preset = entry.transforms()
    preprocessing = Preprocessing(
        preset.resize_size[0], preset.crop_size[0], tuple(preset.mean), tuple(preset.std), preset.interpolation.value
    )
    return Weights(tensors, preprocessing, name, hashlib.sha256(safetensors.torch.save(tensors)).hexdigest())


def _modern_key(key: str) -> str:
    # torchvision's DenseNet files spell "denselayer1.norm.1"; its models say "denselayer1.norm1".
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key)


def _from_file(path: Path) -> Weights:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StageError(
            f"model.weights: {path}: {error.strerror}; give a .pth or .safetensors file, "
            "a name of torchvision's such as DEFAULT, or null"
        ) from error
    preprocessing = Preprocessing()
    tensors: Any
    if path.suffix.lower() == ".safetensors":
        try:
            tensors = safetensors.torch.load(content)
            preprocessing = _stated_preprocessing(path)
        except (SafetensorError, ValueError, TypeError) as error:
            raise StageError(f"model.weights: {path} is damaged ({error}); fetch it again") from error
    else:
        tensors = _unpickle_tensors(path, content)
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise StageError(
            f"model.weights: {path} is not a dictionary of tensors; save the model's state_dict() and use that"
        )
    return Weights(dict(tensors), preprocessing, str(path), hashlib.sha256(content).hexdigest())


def _unpickle_tensors(path: Path, content: bytes) -> object:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # Damaged files end in nearly anything: RuntimeError, EOFError, IndexError, KeyError, UnpicklingError ...
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise StageError(
                f"model.weights: {path} holds code, which is not run; save the model's state_dict() alone, best as "
                ".safetensors"
            ) from error
        raise StageError(f"model.weights: {path} is damaged or not a PyTorch file; fetch it again") from error


def _stated_preprocessing(path: Path) -> Preprocessing:
    """Return what a safetensors file says of its pictures; the defaults where it says nothing."""
    with safe_open(path, framework="pt") as file:
        stated = (file.metadata() or {}).get(METADATA_KEY, "{}")
    return Preprocessing.from_json(dict(json.loads(stated)).get("preprocessing", {}))
