"""A finished network, from a checkpoint or an ONNX file: image files -> probabilities; whether two are the same."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stages.common.cli import StageError, stop_if_interrupted
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
# The largest difference of a probability, and of `unlike`, that rounding in another order may make.
TOLERANCE, _UNLIKE_TOLERANCE = 1e-4, 1e-3


class _Both(nn.Module):
    """A classifier whose outputs come after the features."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier, self.features = classifier, Features()

    def forward(self, activations: Tensor) -> Tensor:
        # The classifier last: it may begin with a layer that works in place.
        features = self.features(activations)
        return torch.cat([features, self.classifier(activations)], dim=1)


class TorchNetwork:
    """The network of a checkpoint, with what `finetune` wrote beside it; a StageError where it cannot be used."""

    def __init__(self, path: Path, device: torch.device, precision: Precision) -> None:
        network, description = load_checkpoint(path)
        self.network, self.preprocessing = network.eval(), description.preprocessing
        self.classes, self.transform = description.classes, make_transform(self.preprocessing, "none")
        self.unlike = read_reference(path)
        self.tells_unlike = self.unlike is not None
        self._temperature, self._outputs = description.temperature, outputs_for(len(self.classes))
        joined = Network(network.backbone, nn.Sequential(_Both(network.classifier)))
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
        return values.numpy(), None if self.unlike is None else self.unlike(features).double().numpy()


Classifier = TorchNetwork | OnnxNetwork


def open_classifier(path: Path, device: torch.device, precision: Precision) -> Classifier:
    """Load a checkpoint (`.safetensors`) or an exported network (`.onnx`); a StageError where it cannot be used."""
    if path.suffix.lower() == ".onnx":
        if device.type != "cpu" or precision != "float32":
            raise StageError(f"{path}: computed on the CPU in float32; leave out --device and --precision")
        return OnnxNetwork(path)
    if path.suffix.lower() != ".safetensors":
        raise StageError(f"{path}: should end in .safetensors (a checkpoint) or .onnx")
    return TorchNetwork(path, device, precision)


def find_files(given: list[Path]) -> tuple[list[str], int]:
    """Return files as given and the images at any depth in folders, by extension; and how many others these hold.

    Raises:
        StageError: one is not there, or a folder cannot be listed or holds no images.
    """
    paths: list[str] = []
    others = 0
    for path in given:
        if not path.exists():
            raise StageError(f"{path}: no such file or folder")
        if not path.is_dir():
            paths.append(str(path))
            continue
        found = Collection()
        inside = [str(path / name) for name in walk(path, "", found)]
        if found.rejected:
            folder, problem = next(iter(found.rejected.items()))
            raise StageError(f"{path / folder}: {problem}; make it readable or leave it out")
        if not inside:
            raise StageError(f"{path}: no images in this folder")
        paths += inside
        others += sum(file.is_file() for file in path.rglob("*")) - len(inside)
    return paths, others


@dataclass(frozen=True)
class Loaded:
    """Some images: their paths; why one cannot be read, else `None`; the others, transformed, (n, ...), in order."""

    paths: list[str]
    problems: list[str | None]
    images: Tensor


class _Files(Dataset[tuple[Tensor | None, str | None]]):
    """Each image, transformed, or why it cannot be read."""

    def __init__(self, paths: list[str], classifier: Classifier) -> None:
        # Not the network, which would go to each decoding process.
        self.paths, self.transform = paths, classifier.transform
        self.grey_max, self.least = classifier.preprocessing.grey_max, classifier.preprocessing.least("none")

    def __getitem__(self, position: int) -> tuple[Tensor | None, str | None]:
        try:
            content = read_image(Path(self.paths[position]))
            return self.transform(decode_with_facts(content, self.grey_max, self.least).image), None
        except FileNotFoundError:
            return None, "no such file"
        except OSError as error:
            return None, reason(error)
        except ImageError as error:
            return None, str(error)

    def __len__(self) -> int:
        return len(self.paths)


def load(paths: list[str], classifier: Classifier, batch_size: int, workers: int) -> Iterator[Loaded]:
    """Yield images as a network takes them, in batches, in the order of `paths`; `workers`: decoding processes."""
    loader: DataLoader[tuple[Tensor | None, str | None]] = DataLoader(
        _Files(paths, classifier),
        batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=leave_interrupts_to_the_main_process,
    )
    first = 0
    for images, problems in loaded(loader):
        stop_if_interrupted()
        yield Loaded(paths[first : first + len(problems)], problems, images)
        first += len(problems)


def _collate(items: list[tuple[Tensor | None, str | None]]) -> tuple[Tensor, list[str | None]]:
    images = [image for image, _ in items if image is not None]
    return torch.stack(images) if images else torch.empty(0), [problem for _, problem in items]


def require_same(original: Classifier, exported: Classifier, root: Path, test: list[Entry], workers: int) -> str:
    """Say how far an exported network agrees with the original on the test images.

    Raises:
        StageError: it is another network, or an image cannot be read.
    """
    paths, answers = [str(root / entry.path) for entry in test], []
    for network in (original, exported):
        batches = []
        parts = load(paths, network, _BATCH, workers)
        for some in tqdm(parts, total=-(-len(paths) // _BATCH), desc="comparing", unit=" batches", disable=None):
            for path, problem in zip(some.paths, some.problems, strict=True):
                if problem is not None:
                    raise StageError(f"{path}: {problem}; bring it back, or run `dvc repro`")
            values, unlike = network.predict(some.images)
            batches.append((values, np.zeros(len(values)) if unlike is None else unlike))
        answers.append([np.concatenate(part) for part in zip(*batches, strict=True)])
    (before, unlike_before), (after, unlike_after) = answers
    compared, same = compare(np.array([entry.label for entry in test]), before, after)
    if not same:
        raise StageError(f"not exported, for it would be another network: {compared}")
    if np.abs(unlike_before - unlike_after).max() > _UNLIKE_TOLERANCE:
        raise StageError("not exported, for `unlike` of the test images would be another number")
    return compared


def compare(labels: Labels, original: Probabilities, exported: Probabilities) -> tuple[str, bool]:
    """Say in a line how two networks' probabilities differ, and whether these may be the same network.

    Then no probability differs by more than rounding makes, and the only predictions that changed are between classes
    that the original takes for equally probable: ties.
    """
    before, after = predicted_labels(original), predicted_labels(exported)
    changed = np.flatnonzero(before != after)
    gaps = np.abs(original[changed, before[changed]] - original[changed, after[changed]])
    ties, largest = int((gaps <= TOLERANCE).sum()), float(np.abs(original - exported).max())  # perhaps NaN
    told = f" ({plural(ties, 'tie')})" if ties else ""
    line = (
        f"compared with the checkpoint: {plural(len(labels), 'test image')} through both: largest difference of a "
        f"probability {largest:.1e}, {plural(len(changed), 'prediction')} changed{told}, accuracy "
        f"{percent((before == labels).mean())} and {percent((after == labels).mean())}"
    )
    return line, largest <= TOLERANCE and len(changed) == ties
