"""Telling a weight file from the name of weights. By itself, since it is asked before torch is worth loading."""

from pathlib import Path

_SUFFIXES = {".pth", ".pt", ".bin", ".safetensors"}


def weight_file(weights: str | None) -> Path | None:
    """Return the file that `model.weights` means, or `None` where it is a name or null."""
    if weights is None or not ("/" in weights or "\\" in weights or Path(weights).suffix.lower() in _SUFFIXES):
        return None
    return Path(weights).expanduser()
