"""A finished network from a checkpoint or an ONNX file: image files -> probabilities; comparison of two networks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stages.common.cli import StageError, stop_if_interrupted
from stages.common.device import resolve_device
from stages.common.format import percent, plural
from stages.common.params import Precision
from stages.deploy.onnx import Answer, OnnxNetwork
from stages.images.batches import leave_interrupts_to_the_main_process, loaded
from stages.images.collection import Collection, reason, walk
from stages.images.decode import ImageError, decode_with_facts, read_image
from stages.images.index import Entry
from stages.images.preprocessing import make_transform
from stages.network.checkpoint import load_checkpoint
from stages.network.network import Network, set_trainable
from stages.network.objective import outputs_for, probabilities
from stages.scores.metrics import Labels, Probabilities, predicted_labels
from stages.training.loop import Trainer
from stages.training.reference import Features, read_reference

_BATCH = 64
# Largest difference of a probability, and of `unlike`, by rounding in another order.
TOLERANCE, _UNLIKE_TOLERANCE = 1e-4, 1e-3


class _Both(nn.Sequential):
    """A classifier whose outputs come after the features."""

    def forward(self, activations: Tensor) -> Tensor:
        # The classifier comes last, since it may begin with an in-place layer.
        return torch.cat([Features()(activations), self[0](activations)], dim=1)


class TorchNetwork:
    """The network of a checkpoint, with the reference beside it; raises StageError if it cannot be used."""

    def __init__(self, path: Path, device: torch.device, precision: Precision) -> None:
        network, description = load_checkpoint(path)
        self.network, self.preprocessing = network.eval(), description.preprocessing
        self.classes, self.transform = description.classes, make_transform(self.preprocessing, "none")
        self.unlike = read_reference(path)
        self.tells_unlike = self.unlike is not None
        self._temperature, self._outputs = description.temperature, outputs_for(len(self.classes))
        joined = Network(network.backbone, _Both(network.classifier))
        set_trainable(joined, 0)
        self._trainer = Trainer(joined, device, precision)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities, (n, classes), and features, (n, d), on the CPU."""
        values = self._trainer.logits(images).cpu()
        features, logits = values[:, : -self._outputs], values[:, -self._outputs :]
        return probabilities(logits.double(), self._temperature), features

    def predict(self, images: Tensor) -> Answer:
        """Do what `OnnxNetwork.predict` does, with images that `transform` made."""
        values, features = self.look(images)
        unlike = torch.full((len(values),), torch.nan) if self.unlike is None else self.unlike(features)
        return values.numpy(), unlike.double().numpy()


Classifier = TorchNetwork | OnnxNetwork


def open_classifier(path: Path, device: str, precision: Precision) -> Classifier:
    """Load a checkpoint (`.safetensors`) or an exported network (`.onnx`); raises StageError if it cannot be used."""
    if path.suffix.lower() == ".onnx":
        if device not in ("auto", "cpu") or precision != "float32":
            raise StageError(f"{path}: computed on the CPU in float32; leave out --device and --precision")
        return OnnxNetwork(path)
    if path.suffix.lower() != ".safetensors":
        raise StageError(f"{path}: should end in .safetensors (a checkpoint) or .onnx")
    return TorchNetwork(path, resolve_device(device), precision)


def find_files(given: list[Path]) -> tuple[list[str], int]:
    """Return the given files, and images (by extension) at any depth in folders; and the number of their other files.

    Raises:
        StageError: a path does not exist, or a folder cannot be listed or has no images.
    """
    paths, found = [], Collection()
    for path in given:
        if not path.exists():
            raise StageError(f"{path}: no such file or folder")
        inside = list(walk(path, "", found)) if path.is_dir() else [""]
        for folder, problem in found.rejected.items():
            raise StageError(f"{path / folder}: {problem}; make it readable or leave it out")
        if not inside:
            raise StageError(f"{path}: no images in this folder")
        paths += [str(path / name) for name in inside]
    return paths, found.ignored.total()


@dataclass(frozen=True)
class Loaded:
    """A batch: paths; why an image cannot be read, or `None`; the readable images, transformed, (n, ...), in order."""

    paths: list[str]
    problems: list[str | None]
    images: Tensor


class _Files(Dataset[tuple[str, Tensor | str]]):
    """Items: the path, and the transformed image or why it cannot be read."""

    def __init__(self, paths: list[str], classifier: Classifier) -> None:
        # Not the network, which would be sent to each decoding process.
        self.paths, self.transform, self.preprocessing = paths, classifier.transform, classifier.preprocessing

    def __getitem__(self, position: int) -> tuple[str, Tensor | str]:
        path, preprocessing = self.paths[position], self.preprocessing
        try:
            content, least = read_image(Path(path)), preprocessing.least("none")
            return path, self.transform(decode_with_facts(content, preprocessing.grey_max, least).image)
        except OSError as error:
            return path, "no such file" if isinstance(error, FileNotFoundError) else reason(error)
        except ImageError as error:
            return path, str(error)

    def __len__(self) -> int:
        return len(self.paths)


def load(paths: list[str], classifier: Classifier, batch_size: int, workers: int) -> Iterator[Loaded]:
    """Yield batches of transformed images in the order of `paths`; `workers`: decoding processes."""
    loader: DataLoader[tuple[str, Tensor | str]] = DataLoader(
        _Files(paths, classifier),
        batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=leave_interrupts_to_the_main_process,
    )
    for some in loaded(loader):
        stop_if_interrupted()
        yield some


def _collate(items: list[tuple[str, Tensor | str]]) -> Loaded:
    images = [image for _, image in items if isinstance(image, Tensor)]
    problems = [image if isinstance(image, str) else None for _, image in items]
    return Loaded([path for path, _ in items], problems, torch.stack(images) if images else torch.empty(0))


def require_same(original: Classifier, exported: Classifier, root: Path, test: list[Entry], workers: int) -> str:
    """Compare an exported network with the original on the test images; return a sentence.

    Raises:
        StageError: it is another network, or an image cannot be read.
    """
    paths, answers = [str(root / entry.path) for entry in test], []
    for network in (original, exported):
        batches, parts = [], load(paths, network, _BATCH, workers)
        for some in tqdm(parts, total=-(-len(paths) // _BATCH), desc="comparing", unit=" batches", disable=None):
            for path, problem in zip(some.paths, some.problems, strict=True):
                if problem is not None:
                    raise StageError(f"{path}: {problem}; bring it back, or run `dvc repro`")
            batches.append(network.predict(some.images))
        answers.append([np.concatenate(part) for part in zip(*batches, strict=True)])
    (before, unlike_before), (after, unlike_after) = answers
    compared = compare(np.array([entry.label for entry in test]), before, after)
    if np.abs(unlike_before - unlike_after).max() > _UNLIKE_TOLERANCE:  # False for NaN, which means unknown
        raise StageError("not exported, for `unlike` of the test images would be another number")
    return compared


def compare(labels: Labels, original: Probabilities, exported: Probabilities) -> str:
    """Return a line on the differences of two networks' probabilities.

    Raises:
        StageError: the networks differ: a probability by more than rounding, or a prediction that is no tie between
            equally probable classes.
    """
    before, after = predicted_labels(original), predicted_labels(exported)
    changed = np.flatnonzero(before != after)
    gaps = np.abs(original[changed, before[changed]] - original[changed, after[changed]])
    ties, largest = int((gaps <= TOLERANCE).sum()), float(np.abs(original - exported).max())  # may be NaN
    told = f" ({plural(ties, 'tie')})" if ties else ""
    line = (
        f"compared with the checkpoint: {plural(len(labels), 'test image')} through both: largest difference of a "
        f"probability {largest:.1e}, {plural(len(changed), 'prediction')} changed{told}, accuracy "
        f"{percent((before == labels).mean())} and {percent((after == labels).mean())}"
    )
    if not (largest <= TOLERANCE and len(changed) == ties):
        raise StageError(f"not exported, for it would be another network: {line}")
    return line
