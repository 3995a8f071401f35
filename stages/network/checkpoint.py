"""Checkpoints: safetensors files that hold all that is needed to use the network again."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.common.cli import StageError
from stages.common.files import write_bytes
from stages.common.format import enumerate_names
from stages.common.params import Head
from stages.images.index import Entry, class_names
from stages.images.preprocessing import Preprocessing
from stages.network.backbones import stock_shapes
from stages.network.network import Network, build_network
from stages.network.objective import outputs_for

# One key only: safetensors writes several in an order that changes from run to run, and so would the file's bytes.
_KEY = "checkpoint"
_AGAIN = "`dvc repro` makes the pipeline's own again"


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself.

    `hidden` is 0 where the head is linear; `standardized`: it standardizes its features. `classes` are in the order of
    their labels; `weights` and `weights_sha256` tell where the backbone came from, `None` for a random one. The logits
    are to be divided by `temperature` before they become probabilities; it is 1 where none was fitted. `recipe` has the
    parameters that it was made with, by their names in `params.yaml`.
    """

    arch: str
    head: Head
    hidden: int
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    weights: str | None
    weights_sha256: str | None
    temperature: float = 1.0
    standardized: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, network: Network, description: Description) -> None:
    """Write `backbone.*` and `classifier.*` tensors and the description, whole or not at all.

    The same network gives the same bytes.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    write_bytes(
        path,
        safetensors.torch.save(
            tensors, {_KEY: json.dumps(asdict(description) | {"preprocessing": description.preprocessing.to_json()})}
        ),
    )


def load_checkpoint(path: Path) -> tuple[Network, Description]:
    """Read a checkpoint; raises StageError where it is missing, damaged, or none of this project."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except FileNotFoundError as error:
        raise StageError(f"{path}: no such checkpoint; {_AGAIN}") from error
    except (SafetensorError, OSError) as error:
        raise StageError(f"{path}: damaged checkpoint ({error}); {_AGAIN}") from error
    if _KEY not in metadata:
        raise StageError(f"{path}: not a checkpoint of this pipeline; {_AGAIN}")
    try:
        description = _read_description(metadata[_KEY])
    except (ValueError, TypeError, KeyError) as error:
        raise StageError(f"{path}: not a checkpoint of this pipeline, or of another version of it; {_AGAIN}") from error
    crop, outputs = description.preprocessing.crop, outputs_for(len(description.classes))
    stock = stock_shapes(description.arch, crop)
    with torch.device("meta"):  # without the time that random values take
        network = build_network(stock, description.head, description.hidden, outputs, crop, description.standardized)
    try:
        network.to_empty(device="cpu").load_state_dict(tensors)
    except RuntimeError as error:
        raise StageError(f"{path}: its tensors are not those of its {description.arch}; {_AGAIN}") from error
    return network, description


def read_own(path: Path) -> Description | None:
    """Return the description of a checkpoint of this project, `None` for any other safetensors file."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY)
    return None if text is None else _read_description(text)


def continue_from(network: Network, description: Description, tensors: Mapping[str, Tensor], own: Description) -> bool:
    """Copy the backbone of a checkpoint into a new network, and its head where head and classes are the same.

    Returns whether the head was copied. Raises StageError where the backbone is for images of another size.
    """
    classifier = network.classifier.state_dict()
    same = [(one.head, one.classes) for one in (description, own)]
    keeps_head = same[0] == same[1] and all(
        f"classifier.{key}" in tensors and tensors[f"classifier.{key}"].shape == value.shape
        for key, value in classifier.items()
    )
    wanted = ("backbone.", "classifier.")[: 1 + keeps_head]
    try:
        network.load_state_dict({key: value for key, value in tensors.items() if key.startswith(wanted)}, strict=False)
    except RuntimeError as error:
        raise StageError(
            f"model.weights: {description.weights} was trained at {own.preprocessing.crop} pixels; set "
            f"model.image_size={own.preprocessing.crop}"
        ) from error
    return keeps_head


def require_classes(path: Path, description: Description, entries: list[Entry]) -> None:
    """Refuse a checkpoint that was made for other classes than an index has; a class may have no image there."""
    if not {(entry.label, entry.class_name) for entry in entries} <= set(enumerate(description.classes)):
        raise StageError(
            f"{path}: made for the classes {enumerate_names(description.classes)}, but the index has "
            f"{enumerate_names(class_names(entries))}; {_AGAIN}"
        )


def _read_description(text: str) -> Description:
    values = json.loads(text)
    preprocessing = Preprocessing.from_json(values["preprocessing"])
    return Description(**{**values, "classes": tuple(values["classes"]), "preprocessing": preprocessing})
