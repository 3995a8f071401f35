"""Whether an exported network is the same network: two sets of probabilities of the same images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stages.common.cli import StageError
from stages.common.format import percent, plural
from stages.common.machine import resolve_workers
from stages.common.params import Params
from stages.deploy.classifier import classify, open_classifier
from stages.images.index import Entry
from stages.scores.metrics import Labels, Probabilities, predicted_labels

# The largest difference of a probability that rounding in another order may make.
TOLERANCE = 1e-4
# The same of `unlike`.
_UNLIKE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Agreement:
    """How the exported network differs from the original on `images`.

    `largest_difference` of a probability; `changed` predictions, of which `ties` are between classes that the original
    takes for equally probable, within `TOLERANCE`; both accuracies.
    """

    images: int
    largest_difference: float
    changed: int
    ties: int
    accuracy: float
    exported_accuracy: float

    @property
    def is_close(self) -> bool:
        """Whether it may be handed over."""
        return self.largest_difference <= TOLERANCE and self.changed == self.ties


def measure_agreement(labels: Labels, original: Probabilities, exported: Probabilities) -> Agreement:
    """Compare two networks."""
    before, after = predicted_labels(original), predicted_labels(exported)
    changed = np.flatnonzero(before != after)
    gaps = np.abs(original[changed, before[changed]] - original[changed, after[changed]])
    difference = np.abs(original - exported)
    return Agreement(
        len(labels),
        float(difference.max()) if np.isfinite(difference).all() else float("inf"),
        len(changed),
        int((gaps <= TOLERANCE).sum()),
        float((before == labels).mean()),
        float((after == labels).mean()),
    )


def describe_agreement(agreement: Agreement) -> str:
    """Put it into one line."""
    ties = f" ({plural(agreement.ties, 'tie')})" if agreement.ties else ""
    return (
        f"compared with the checkpoint: {plural(agreement.images, 'test image')} through both: largest difference "
        "of a probability "
        f"{agreement.largest_difference:.1e}, {plural(agreement.changed, 'prediction')} changed{ties}, accuracy "
        f"{percent(agreement.accuracy)} and {percent(agreement.exported_accuracy)}"
    )


def require_same(checkpoint: Path, exported: Path, root: Path, test: list[Entry], params: Params) -> str:
    """Say how far an exported network agrees with its checkpoint on the test images.

    Raises:
        StageError: it is another network, or an image cannot be read.
    """
    workers, cpu = resolve_workers(params.workers), torch.device("cpu")
    (before, unlike), (after, unlike_there) = (
        classify(open_classifier(path, cpu, "float32"), root, test, workers) for path in (checkpoint, exported)
    )
    agreement = measure_agreement(np.array([entry.label for entry in test]), before, after)
    if not agreement.is_close:
        raise StageError(f"not exported, for it would be another network: {describe_agreement(agreement)}")
    if unlike is not None and unlike_there is not None and np.abs(unlike - unlike_there).max() > _UNLIKE_TOLERANCE:
        raise StageError("not exported, for `unlike` of the test images would be another number")
    return describe_agreement(agreement)
