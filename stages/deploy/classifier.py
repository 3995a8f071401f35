"""A finished network, from a checkpoint or an ONNX file: images -> probabilities."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from stages.common.cli import StageError
from stages.common.params import Precision
from stages.deploy.onnx import OnnxNetwork
from stages.deploy.unlabelled import Transform, load
from stages.images.index import Entry
from stages.images.preprocessing import Preprocessing, make_framing, make_transform
from stages.network.checkpoint import Description, load_checkpoint
from stages.network.network import Network, set_trainable
from stages.network.objective import outputs_for, probabilities
from stages.training.loop import Trainer
from stages.training.reference import Features, read_reference

_BATCH = 64
# Probabilities, (n, classes), and how unlike the training images, (n,).
Answer = tuple[NDArray[np.float64], NDArray[np.float64] | None]


@dataclass(frozen=True)
class Classifier:
    """What is needed to classify images.

    `classes` are in the order of their labels; `transform` makes of an RGB image what `predict` takes, in
    batches (n, 3, crop, crop), to return probabilities (n, classes) and, where it is known, how unlike the training
    images they are, (n,); `tells_unlike`: whether it is.
    """

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    transform: Transform
    predict: Callable[[Tensor], Answer]
    tells_unlike: bool


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
            lambda images: exported.predict(images.numpy()),
            exported.tells_unlike,
        )
    if path.suffix.lower() != ".safetensors":
        raise StageError(f"{path}: should end in .safetensors (a checkpoint) or .onnx")
    description, look = open_network(path, device, precision)
    unlike = read_reference(path)

    def predict(images: Tensor) -> Answer:
        values, features = look(images)
        return values.numpy(), None if unlike is None else unlike(features).double().numpy()

    return Classifier(
        description.classes,
        description.preprocessing,
        make_transform(description.preprocessing, "none"),
        predict,
        unlike is not None,
    )


class _Both(nn.Module):
    """A classifier whose outputs come after the features."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier, self.features = classifier, Features()

    def forward(self, activations: Tensor) -> Tensor:
        # The classifier last: it may begin with a layer that works in place.
        features = self.features(activations)
        return torch.cat([features, self.classifier(activations)], dim=1)


def open_network(
    path: Path, device: torch.device, precision: Precision
) -> tuple[Description, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Load a checkpoint; return its description, and what makes of images probabilities and features, on the CPU.

    Raises:
        StageError: the file cannot be used.
    """
    network, description = load_checkpoint(path)
    outputs = outputs_for(len(description.classes))
    joined = Network(network.backbone, nn.Sequential(_Both(network.classifier)))
    set_trainable(joined, 0)
    trainer = Trainer(joined, device, precision)

    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        values = trainer.logits(images).cpu()
        features, logits = values[:, :-outputs], values[:, -outputs:]
        return probabilities(logits.double(), description.temperature), features

    return description, look


def classify(classifier: Classifier, root: Path, test: list[Entry], workers: int) -> Answer:
    """Return the probabilities, (n, classes), of the images on disk, and how unlike the training images they are.

    Raises:
        StageError: one of them cannot be read.
    """
    paths = [str(root / entry.path) for entry in test]
    batches = []
    parts = load(paths, classifier.transform, classifier.preprocessing, _BATCH, workers)
    for some in tqdm(parts, total=-(-len(paths) // _BATCH), desc="comparing", unit=" batches", disable=None):
        for path, problem in zip(some.paths, some.problems, strict=True):
            if problem is not None:
                raise StageError(f"{path}: {problem}; bring it back, or run `dvc repro`")
        batches.append(classifier.predict(some.images))
    values, unlike = zip(*batches, strict=True)
    return np.concatenate(values), np.concatenate(unlike) if classifier.tells_unlike else None
