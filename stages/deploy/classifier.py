"""A finished network, from a checkpoint or an ONNX file: pictures -> probabilities."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.common.cli import StageError
from stages.common.params import Precision
from stages.deploy.onnx import OnnxNetwork
from stages.deploy.unlabelled import Transform, load
from stages.images.index import Entry
from stages.images.preprocessing import Preprocessing, make_framing, make_transform
from stages.network.checkpoint import load_checkpoint
from stages.network.network import set_trainable
from stages.network.objective import probabilities
from stages.training.loop import Trainer

_BATCH = 64


@dataclass(frozen=True)
class Classifier:
    """What is needed to classify pictures.

    `classes` are in the order of their labels; `transform` makes of an RGB picture what `probabilities` takes, in
    batches (n, 3, crop, crop), to return (n, classes).
    """

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    transform: Transform
    probabilities: Callable[[Tensor], NDArray[np.float64]]


def open_classifier(path: Path, device: torch.device, precision: Precision) -> Classifier:
    """Load a checkpoint (`.safetensors`) or an exported network (`.onnx`).

    Args:
        path: of the file.
        device: where to compute; ONNX files on the CPU only.
        precision: in what; ONNX files in float32 only.

    Raises:
        StageError: the file cannot be used, or not so.
    """
    if path.suffix.lower() == ".onnx":
        if device.type != "cpu" or precision != "float32":
            raise StageError(f"{path}: computed on the CPU in float32; leave out --device and --precision")
        exported = OnnxNetwork(path)
        return Classifier(
            exported.classes,
            exported.preprocessing,
            make_framing(exported.preprocessing),
            lambda images: exported.probabilities(images.numpy()),
        )
    if path.suffix.lower() != ".safetensors":
        raise StageError(f"{path}: should end in .safetensors (a checkpoint) or .onnx")
    network, description = load_checkpoint(path)
    set_trainable(network, 0)
    trainer = Trainer(network, device, precision)

    def predict(images: Tensor) -> NDArray[np.float64]:
        values: NDArray[np.float64] = probabilities(
            trainer.logits(images).cpu().double(), description.temperature
        ).numpy()
        return values

    return Classifier(
        description.classes,
        description.preprocessing,
        make_transform(description.preprocessing, "none"),
        predict,
    )


def classify(classifier: Classifier, root: Path, test: list[Entry], workers: int) -> NDArray[np.float64]:
    """Return the probabilities, (n, classes), of the pictures on disk.

    Raises:
        StageError: one of them cannot be read.
    """
    paths = [str(root / entry.path) for entry in test]
    batches = []
    for some in load(paths, classifier.transform, classifier.preprocessing, _BATCH, workers):
        for path, problem in zip(some.paths, some.problems, strict=True):
            if problem is not None:
                raise StageError(f"{path}: {problem}; bring it back, or run `dvc repro`")
        batches.append(classifier.probabilities(some.images))
    return np.concatenate(batches)
