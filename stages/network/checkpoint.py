"""Checkpoints: safetensors files with everything needed to use the network."""

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

# One key only: safetensors writes several in random order, so the file's bytes would change from run to run.
_KEY = "checkpoint"
_AGAIN = "`dvc repro` makes the pipeline's own again"


@dataclass(frozen=True)
class Description:
    """The metadata of a checkpoint.

    `hidden`: 0 for a linear head; `standardized`: the head standardizes its features; `classes`: in the order of their
    labels; `weights`, `weights_sha256`: origin of the backbone, `None` for a random one; `temperature`: divides the
    logits before they become probabilities, 1 if none was fitted; `recipe`: the parameters of the run, by their names
    in `params.yaml`.
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
    """Read a checkpoint; raises StageError if it is missing, damaged, or not this project's."""
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
    with torch.device("meta"):  # saves the time to draw random values
        network = build_network(stock, description.head, description.hidden, outputs, crop, description.standardized)
    try:
        network.to_empty(device="cpu").load_state_dict(tensors)
    except RuntimeError as error:
        raise StageError(f"{path}: its tensors are not those of its {description.arch}; {_AGAIN}") from error
    return network, description


def read_own(path: Path) -> Description | None:
    """Return the metadata of this project's checkpoint; `None` for any other safetensors file."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY)
    return None if text is None else _read_description(text)


def continue_from(network: Network, description: Description, tensors: Mapping[str, Tensor], own: Description) -> bool:
    """Copy the backbone of a checkpoint into a new network, and its head if kind of head and classes agree.

    Returns whether the head was copied. Raises StageError if the backbone is for another size of images.
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
    """Raise StageError if an index has other classes than the checkpoint; it may lack some."""
    if not {(entry.label, entry.class_name) for entry in entries} <= set(enumerate(description.classes)):
        raise StageError(
            f"{path}: made for the classes {enumerate_names(description.classes)}, but the index has "
            f"{enumerate_names(class_names(entries))}; {_AGAIN}"
        )


def _read_description(text: str) -> Description:
    values = json.loads(text)
    preprocessing = Preprocessing.from_json(values["preprocessing"])
    return Description(**{**values, "classes": tuple(values["classes"]), "preprocessing": preprocessing})
