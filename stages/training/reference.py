"""How unlike the training images an image is, by the features that enter the fine-tuned network's classifier.

The cosine distance to the nearest training image (deep nearest neighbours, Sun et al. 2022,
https://arxiv.org/abs/2204.06507), divided by the 99th percentile of this distance among validation images. Alternatives
that were measured: docs/results.md.
"""

import json
import sys
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from stages.common.cli import StageError
from stages.common.device import generator_for
from stages.common.files import sha256_of, write_bytes
from stages.common.format import plural
from stages.common.params import Precision
from stages.network.network import Network
from stages.training.batches import open_batches
from stages.training.features import FrozenPrefix, Kept
from stages.training.loop import Trainer, predict
from stages.training.phase import Entries

# Training images, and images for the threshold.
MOST = 5_000
FLAGGED = 0.01
_KEY, _FEATURES = "reference", "features"
_AT_ONCE = 1024


class Features(nn.Module):
    """Outputs of the backbone -> a unit vector per image, (n, d): the mean of maps, or the class token."""

    def forward(self, activations: Tensor) -> Tensor:
        """Return the features."""
        if activations.dim() == 4:
            activations = activations.mean((2, 3))
        return functional.normalize(activations[:, 0] if activations.dim() == 3 else activations)


class Unlike(nn.Module):
    """Features, (n, d) -> how unlike the training images they are, (n,); above 1.0: more than 99% of images.

    `nearest`: features of training images, (m, d); `threshold`: the cosine distance that counts as 1.0.
    """

    nearest: Tensor

    def __init__(self, nearest: Tensor, threshold: float) -> None:
        super().__init__()
        self.register_buffer("nearest", nearest)
        self.threshold = threshold

    def forward(self, features: Tensor) -> Tensor:
        """Return the numbers."""
        return (1 - (features @ self.nearest.T).amax(1)).clamp(min=0) / self.threshold


def measure_unlike(
    tail: Network, prefix: FrozenPrefix, kept: Kept, entries: Entries, batch_size: int, precision: Precision, seed: int
) -> Unlike:
    """Compute the features of training images, and the threshold that flags 1% of the validation images.

    Without validation images, the threshold comes from the training images, each against the others. At most `MOST`
    images of either are used, drawn by `seed`; a message gives the numbers. `tail`: the trained blocks and the
    classifier; `prefix`: the blocks before them; `kept`: as returned by `keep`.
    """
    trainer = Trainer(Network(tail.backbone, nn.Sequential(Features())), prefix.device, precision)
    chosen = []
    for part in (entries.train, entries.validation):
        # A copy has distance 0 from its original.
        own = list({entry.sha256: entry for entry in part}.values())
        rows = torch.randperm(len(own), generator=generator_for(seed))[:MOST].sort().values
        chosen.append([own[row] for row in rows.tolist()])
    train, val = chosen
    features = predict([trainer], open_batches(prefix, [*train, *val], kept, batch_size))[0].float()
    nearest, others = features[: len(train)], features[len(train) :]
    if val:
        distances = Unlike(nearest, 1.0)(others)
    else:
        distances = torch.empty(len(train))
        for first in range(0, len(train), _AT_ONCE):
            cosines = nearest[first : first + _AT_ONCE] @ nearest.T
            cosines[range(len(cosines)), range(first, first + len(cosines))] = -1.0
            distances[first : first + _AT_ONCE] = 1 - cosines.amax(1)
    threshold = max(float(distances.quantile(1 - FLAGGED, interpolation="higher")), 1e-6)
    basis = plural(len(val), "validation image") if val else "each of them against the others, as none are validation"
    print(f"unlike: distances to {plural(len(train), 'training image')}, 1.0 from {basis}")
    return Unlike(nearest, threshold)


def write_reference(path: Path, unlike: Unlike, checkpoint: Path) -> None:
    """Write the file that `read_reference` reads, for a checkpoint that is already written."""
    about = json.dumps({"checkpoint_sha256": sha256_of(checkpoint), "threshold": unlike.threshold})
    write_bytes(path, safetensors.torch.save({_FEATURES: unlike.nearest.contiguous()}, {_KEY: about}))


def read_reference(checkpoint: Path) -> Unlike | None:
    """Read `reference.safetensors` beside a checkpoint; if it is missing or another one's, print so and return `None`.

    Raises StageError if it is damaged.
    """
    path = checkpoint.with_name("reference.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_KEY])
            unlike = Unlike(file.get_tensor(_FEATURES), float(about["threshold"]))
            problem = "" if about["checkpoint_sha256"] == sha256_of(checkpoint) else f"{path} is of another checkpoint"
    except FileNotFoundError:
        problem = f"there is no {path}"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path}: damaged ({error}); `dvc repro finetune` writes it again") from error
    if not problem:
        return unlike
    print(f"without `unlike`: {problem}; `dvc repro finetune` writes it", file=sys.stderr)
    return None
