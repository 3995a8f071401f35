"""Checkpoints: safetensors files that hold all that is needed to use the network again."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open

from stages.common.command import StageError
from stages.common.files import write_bytes
from stages.common.images import Preprocessing
from stages.common.index import Entry, class_names
from stages.common.network import Head, Network, build_network, stock_model
from stages.common.objective import outputs_for

# One key only: safetensors writes several in an order that changes from run to run, and so would the file's bytes.
_KEY = "checkpoint"


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself.

    `classes` are in the order of their labels; `weights` and `weights_sha256` tell where the backbone came from, `None`
    for a random one.
    """

    arch: str
    head: Head
    hidden: int
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    weights: str | None
    weights_sha256: str | None


def save_checkpoint(path: Path, network: Network, description: Description) -> None:
    """Write `backbone.*` and `classifier.*` tensors and the description, whole or not at all.

    The same network gives the same bytes.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    write_bytes(path, safetensors.torch.save(tensors, {_KEY: json.dumps(asdict(description))}))


def load_checkpoint(path: Path, entries: list[Entry]) -> tuple[Network, Description]:
    """Read a checkpoint, with everything frozen or not as a new network is.

    Args:
        path: the file.
        entries: of the index that it is to be used with.

    Raises:
        StageError: missing, damaged, not a checkpoint of this project, or made for other classes than the index has.
    """
    again = "`dvc repro` makes it anew"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except FileNotFoundError as error:
        raise StageError(f"{path}: no such checkpoint; {again}") from error
    except (SafetensorError, OSError) as error:
        raise StageError(f"{path}: damaged checkpoint ({error}); {again}") from error
    if _KEY not in metadata:
        raise StageError(f"{path}: not a checkpoint of this pipeline; {again}")
    description = _read_description(metadata[_KEY])
    classes = class_names(entries)
    if list(description.classes) != classes:
        raise StageError(
            f"{path}: made for the classes {', '.join(description.classes)}, but the index has "
            f"{', '.join(classes)}; {again}"
        )
    stock = stock_model(description.arch)
    network = build_network(
        stock, description.head, description.hidden, outputs_for(len(classes)), description.preprocessing.crop
    )
    network.load_state_dict(tensors)
    return network, description


def _read_description(text: str) -> Description:
    values = json.loads(text)
    preprocessing = Preprocessing.from_json(values["preprocessing"])
    return Description(**{**values, "classes": tuple(values["classes"]), "preprocessing": preprocessing})
