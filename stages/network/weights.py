"""Pretrained weights: torchvision's by name, a file, or none; and the network that training starts from."""

import difflib
import hashlib
import io
import json
import math
import pickle
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.error import URLError

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models import VisionTransformer, WeightsEnum, get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

from stages.common.cli import StageError, is_out_of_memory
from stages.common.device import make_deterministic
from stages.common.machine import resolve_workers
from stages.common.params import Params, weight_file
from stages.images.batches import Batches, Order
from stages.images.index import Entry, class_names
from stages.images.preprocessing import Preprocessing
from stages.network.backbones import (
    cut_into_blocks,
    native_preprocessing,
    own_normalization,
    require_architecture,
    stock_model,
)
from stages.network.checkpoint import Description, continue_from, read_own
from stages.network.layouts import to_torchvision, unwrap, whose
from stages.network.network import Network, build_network, calibrate_batchnorm, set_trainable
from stages.network.objective import outputs_for

# The key of a .safetensors file's JSON object, with the `preprocessing` of the images. One key only, since safetensors
# writes several in random order, so the file's bytes would change from run to run.
METADATA_KEY = "pretraining"

_DOWNLOAD_TIMEOUT = 30  # seconds without a response


@dataclass(frozen=True)
class Weights:
    """Tensors by torchvision's names, and their origin.

    `source`: the name or file in `params.yaml`; `sha256`: of the file, or of the tensors of named weights; both are
    `None` for random weights, which have no `tensors`. `own`: the metadata of this project's checkpoint, whose names
    the tensors then have.
    """

    tensors: Mapping[str, Tensor]
    preprocessing: Preprocessing
    source: str | None
    sha256: str | None
    own: Description | None = None


def find_weights(arch: str, weights: str | None) -> Weights:
    """Load the weights that `model.weights` names. Only tensors are unpickled.

    Raises:
        StageError: an unknown architecture or name (similar ones are named), a failed download, a file that is missing,
            damaged, or not a dictionary of tensors.
    """
    require_architecture(arch)
    if weights is None:
        return Weights({}, native_preprocessing(arch), None, None)
    file = weight_file(weights)
    found = _from_name(arch, weights) if file is None else _from_file(file, native_preprocessing(arch))
    if found.own is not None and found.own.arch != arch:
        raise StageError(f"model.weights: {weights} is a {found.own.arch}; set model.arch={found.own.arch}")
    return found


def load_into(stock: nn.Module, weights: Weights, arch: str) -> None:
    """Copy weights into a stock model: all of the backbone, and of the classifier what the file has.

    Not those of this project's checkpoints, which are for a network with a new head (`continue_from`). Raises
    StageError if the weights are of another architecture.
    """
    if weights.source is None or weights.own is not None:
        return
    expected = stock.state_dict(keep_vars=True)
    given = _fit_positions(to_torchvision(dict(weights.tensors)), stock)
    blocks = nn.ModuleList(cut_into_blocks(stock).blocks.values()).state_dict(keep_vars=True).values()
    backbone = {id(tensor) for tensor in blocks}
    # A counter for an optional average, unused here; files older than torch 0.4.1 lack it.
    needed = [
        key for key, tensor in expected.items() if id(tensor) in backbone and not key.endswith("num_batches_tracked")
    ]
    missing = [key for key in needed if key not in given]
    shapes = [key for key in needed if key in given and given[key].shape != expected[key].shape]
    parts = {key.partition(".")[0] for key in needed}
    foreign = [key for key in given if key not in expected and key.partition(".")[0] in parts]
    for keys, problem in ((missing, "lacks"), (shapes, "has another shape of"), (foreign, "also has")):
        if keys:
            owner = whose(given)
            raise StageError(
                f"model.weights: {weights.source} is not for {arch}: it {problem} {keys[0]} "
                f"({len(keys)} such tensors)"
                + (f"; its names are {owner}" if owner else "")
                + "; set model.arch to the network that it was made for, or save it with torchvision's names"
            )
    # Not load_state_dict: MNASNet's needs metadata, which a dictionary of tensors lacks.
    with torch.no_grad():
        for key, tensor in given.items():
            if key in expected and tensor.shape == expected[key].shape:
                expected[key].copy_(tensor)


def _fit_positions(tensors: dict[str, Tensor], stock: nn.Module) -> dict[str, Tensor]:
    """Interpolate a vision transformer's position embeddings, if they are for another size of images."""
    key = "encoder.pos_embedding"
    if not isinstance(stock, VisionTransformer) or key not in tensors or tensors[key].dim() != 3:
        return tensors
    wanted, given = stock.encoder.pos_embedding, tensors[key]
    patches = given.shape[1] - 1
    if given.shape[2] != wanted.shape[2] or math.isqrt(patches) ** 2 != patches:
        return tensors  # of another network: load_into reports it
    fitted: dict[str, Tensor] = interpolate_embeddings(stock.image_size, stock.patch_size, tensors)
    return fitted


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
    mean, std = own_normalization(arch) or (tuple(preset.mean), tuple(preset.std))
    preprocessing = Preprocessing(preset.resize_size[0], preset.crop_size[0], mean, std, preset.interpolation.value)
    return Weights(tensors, preprocessing, name, hashlib.sha256(safetensors.torch.save(tensors)).hexdigest())


def _modern_key(key: str) -> str:
    # torchvision's DenseNet files spell "denselayer1.norm.1"; its models say "denselayer1.norm1".
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key)


def _from_file(path: Path, native: Preprocessing) -> Weights:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StageError(
            f"model.weights: {path}: {error.strerror}; give a .pth or .safetensors file, "
            "a name of torchvision's such as DEFAULT, or null"
        ) from error
    preprocessing = native
    tensors: Any
    if path.suffix.lower() == ".safetensors":
        try:
            tensors = safetensors.torch.load(content)
            if own := read_own(path):
                return Weights(tensors, own.preprocessing, str(path), hashlib.sha256(content).hexdigest(), own)
            preprocessing = _stated_preprocessing(path) or native
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise StageError(f"model.weights: {path} is damaged ({error}); fetch it again") from error
    else:
        tensors = _unpickle_tensors(path, content)
    tensors = unwrap(tensors)
    if tensors is None:
        raise StageError(
            f"model.weights: {path} is not a dictionary of tensors; save the model's state_dict() and use that"
        )
    return Weights(tensors, preprocessing, str(path), hashlib.sha256(content).hexdigest())


def _unpickle_tensors(path: Path, content: bytes) -> object:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # Damaged files raise nearly anything: RuntimeError, EOFError, IndexError, KeyError, UnpicklingError ...
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "torchscript" in str(error).lower():
            raise StageError(
                f"model.weights: {path} is TorchScript, whose code is not run; save the state_dict() of "
                "torch.jit.load(...) and use that"
            ) from error
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise StageError(
                f"model.weights: {path} holds code, which is not run; save the model's state_dict() alone, best as "
                ".safetensors"
            ) from error
        raise StageError(f"model.weights: {path} is damaged or not a PyTorch file; fetch it again") from error


def _stated_preprocessing(path: Path) -> Preprocessing | None:
    """Return the preprocessing stated in a safetensors file, or `None`."""
    with safe_open(path, framework="pt") as file:
        stated = (file.metadata() or {}).get(METADATA_KEY, "{}")
    fields = dict(json.loads(stated)).get("preprocessing")
    return None if fields is None else Preprocessing.from_json(fields)


# More images hardly change the statistics of a random network.
CALIBRATION_BATCHES, CALIBRATION_BATCH = 16, 64


def build_initial(params: Params, entries: list[Entry]) -> tuple[Network, Description, str]:
    """Build the network of `params.model` with a frozen backbone; the same seed gives the same network.

    The training images `entries` name the classes and calibrate a random backbone.

    Returns:
        The network, the metadata of its checkpoint, and the origin of its weights, in words.

    Raises:
        StageError: no such network or weights, or they do not fit each other or the size of the images.
    """
    model, classes = params.model, class_names(entries)
    make_deterministic(params.seed)
    weights = find_weights(model.arch, model.weights)
    preprocessing = weights.preprocessing.framed(model.image_size, model.framing, params.data.grey_max)
    stock = stock_model(model.arch, preprocessing.crop)
    load_into(stock, weights, model.arch)
    hidden, standardized, own = model.hidden, False, weights.own
    if own is not None and (own.head, own.classes) == (model.head, tuple(classes)):
        hidden, standardized = own.hidden, own.standardized
    network = build_network(stock, model.head, hidden, outputs_for(len(classes)), preprocessing.crop, standardized)
    description = Description(
        model.arch,
        model.head,
        hidden,
        tuple(classes),
        preprocessing,
        weights.source,
        weights.sha256,
        standardized=standardized,
        recipe={"seed": params.seed, "model": model.model_dump()},
    )
    source = weights.source or "random"
    if own is not None:
        kept = continue_from(network, description, weights.tensors, own)
        source += f" with {'its' if kept else 'a new'} head"
    if weights.source is None:
        root, workers = Path(params.data.path), resolve_workers(params.workers)
        order = Order(len(entries), params.seed)
        batches = Batches(root, entries, preprocessing, CALIBRATION_BATCH, workers, order=order)
        images = (images for images, _ in islice(batches, CALIBRATION_BATCHES) if len(images) > 1)
        calibrate_batchnorm(network, images)
    set_trainable(network, 0)
    return network, description, source
