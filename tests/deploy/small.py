"""A network that was never trained, as `finetune` would leave it."""

from pathlib import Path

import torch

from stages.images.preprocessing import Preprocessing
from stages.network.backbones import stock_model
from stages.network.checkpoint import Description, save_checkpoint
from stages.network.network import build_network
from stages.network.objective import outputs_for
from stages.training.reference import Unlike, write_reference


def save_random(path: Path, names: tuple[str, ...], temperature: float = 1.0) -> Path:
    """Write a checkpoint of `mobilenet_v3_small`, 64 pixels, and the reference beside it."""
    torch.manual_seed(0)
    network = build_network(stock_model("mobilenet_v3_small", 64), "pooled", 8, outputs_for(len(names)), 64).eval()
    preprocessing = Preprocessing(crop=64)
    description = Description("mobilenet_v3_small", "pooled", 8, names, preprocessing, None, None, temperature)
    save_checkpoint(path, network, description)
    write_reference(path.with_name("reference.safetensors"), Unlike(torch.eye(576)[:3], 0.5), path)
    return path
