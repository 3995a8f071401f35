"""The layer table: the layers of the network, and which are trained."""

import copy
from pathlib import Path

import torch
from torchinfo import ModelStatistics, summary

from stages.common.files import write_json, write_text
from stages.network.network import Network

# The network, its two parts, their blocks, and the parts of a block.
_DEPTH = 3


def count_parameters(network: Network) -> dict[str, int]:
    """Return the numbers of parameters: `total`, `trainable` and `frozen`."""
    total = sum(parameter.numel() for parameter in network.parameters())
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return {"total": total, "trainable": trainable, "frozen": total - trainable}


def write_layers(path: Path, network: Network, image_size: int) -> None:
    """Write the layer table of a network as torchinfo's text (`.txt`) and as JSON (`.json`).

    The JSON object has `total`, `trainable` and `frozen` (numbers of parameters) and `layers`, each with `name`,
    `type`, `depth`, `parameters` and `trainable`: `True`, `False`, `Partial`, or `--` for a layer without parameters.
    """
    # Without values: only shapes matter.
    shapes = copy.deepcopy(network).to("meta")
    # Not by `add_module`, which refuses names with a dot.
    shapes.backbone._modules = dict(zip(network.block_names, shapes.backbone, strict=True))
    table: ModelStatistics = summary(
        shapes,
        input_data=torch.zeros(1, 3, image_size, image_size, device="meta"),
        depth=_DEPTH,
        device="meta",
        col_names=("output_size", "num_params", "trainable"),
        row_settings=("depth", "var_names"),
        verbose=0,
    )
    layers = [
        {
            "name": layer.get_layer_name(show_var_name=True, show_depth=False),
            "type": layer.class_name,
            "depth": layer.depth,
            "parameters": layer.num_params,
            "trainable": layer.trainable,
        }
        for layer in table.summary_list
        if layer.depth <= _DEPTH
    ]
    write_json(path.with_suffix(".json"), {**count_parameters(network), "layers": layers})
    # As comments: DVC then takes the text for a metric without numbers, and its run cache includes it.
    write_text(path.with_suffix(".txt"), "".join(f"# {line}\n" for line in str(table).splitlines()))
