"""Near-identical pictures in the training and the test part: the test accuracy flatters where there are many."""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.common.activations import Inputs
from stages.common.files import write_text
from stages.common.index import Entry
from stages.common.scoring import Labels, Probabilities, predict

# See `find_near_duplicates` for what was measured.
THRESHOLD = 0.9
# Eigenvalues below this fraction of the largest are rounding.
_RANK_TOLERANCE = 1e-9
# How many times the rounding of one operation: that of all of a network's.
_ROUNDINGS = 10
_BLOCK = 512
_DECIMALS = 4


@dataclass(frozen=True)
class Pair:
    """A test picture and a training picture that are nearly the same; `cosine` as in `find_near_duplicates`."""

    test: str
    train: str
    cosine: float


def pool(activations: Tensor) -> Tensor:
    """Return the mean over space: (n, channels, height, width) -> (n, channels), float32, on the CPU."""
    return activations.float().flatten(2).mean(2).cpu()


def pooled_inputs(batches: Inputs) -> Tensor:
    """Return the mean over space of all activations of a pass, (n, channels)."""
    return torch.cat([pool(activations) for activations, _ in batches])


@contextmanager
def collect_pooled(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the mean over space of whatever a module returns, batch by batch, while the context is open."""
    collected: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: collected.append(pool(output)))
    try:
        yield collected
    finally:
        handle.remove()


def find_near_duplicates(train: Tensor, test: Tensor, precision: torch.dtype) -> list[tuple[int, int, float]]:
    """Find the pairs of a test and a training picture whose whitened features have a cosine of `THRESHOLD` or more.

    Whitening: the mean of the training features is subtracted, and all directions in which they vary get about the same
    weight. Features of different pictures have much in common; what tells two pictures of one kind apart is small in
    comparison. Measured with MobileNetV3-Large, four fifths of the pictures being training pictures:

    | | 2,000 photos, ImageNet weights, 224 px | 1,797 digits, the bundled backbone, 64 px |
    |---|---|---|
    | highest cosine of two different pictures | 0.55 | 0.83 |
    | found of copies, re-saved as JPEG at quality 95, 70, 50, 30 | 100%, 99%, 69%, 10% | 100%, 100%, 100%, 98% |
    | found of copies, sides resized to 0.9, 0.75, 0.5 | 98%, 93%, 1% | 100%, 100%, 100% |
    | found of mirrored copies | none | none |

    Among the photos it also finds one that is there twice, saved differently (0.95). No threshold on the plain cosine
    does that: different digits reach 0.995, and 0.992 if the mean is subtracted, while copies of a photo at quality 70
    have 0.982 and 0.966 at worst.

    Args:
        train: pooled features, (n, channels).
        test: likewise, (m, channels).
        precision: what the network computed in.

    Returns:
        (position in test, position in train, cosine), in no special order. The memory needed grows with n and with m,
        not with their product.
    """
    mean, whitening = _whitening(train.double(), torch.finfo(precision).eps)
    known, asked = (_unit((features.double() - mean) @ whitening) for features in (train, test))
    pairs = []
    for first in range(0, len(asked), _BLOCK):
        cosines = asked[first : first + _BLOCK] @ known.T
        for row, column in (cosines >= THRESHOLD).nonzero().tolist():
            pairs.append((first + row, column, cosines[row, column].item()))
    return pairs


def name_pairs(pairs: list[tuple[int, int, float]], train: list[Entry], test: list[Entry]) -> list[Pair]:
    """Turn what `find_near_duplicates` returns into paths, the most similar pair first."""
    named = [Pair(test[row].path, train[column].path, round(cosine, _DECIMALS)) for row, column, cosine in pairs]
    return sorted(named, key=lambda pair: (-pair.cosine, pair.test, pair.train))


def summarize(
    pairs: list[Pair], paths: list[str], labels: Labels, models: dict[str, Probabilities]
) -> dict[str, float | int | None]:
    """Count the pairs, and score the models on the test pictures that are in none.

    Args:
        pairs: as `name_pairs` returns them.
        paths: of the test pictures, (n,).
        labels: (n,).
        models: name -> probabilities, (n, classes).

    Returns:
        `threshold`; `pairs`; `test_pictures`: how many are in pairs; and for each model `NAME_accuracy`, `None` if no
        picture is left.
    """
    paired = {pair.test for pair in pairs}
    left = np.array([path not in paired for path in paths])
    accuracies = {
        f"{name}_accuracy": float((predict(probabilities) == labels)[left].mean()) if left.any() else None
        for name, probabilities in models.items()
    }
    return {"threshold": THRESHOLD, "pairs": len(pairs), "test_pictures": len(paired), **accuracies}


def sentence(summary: dict[str, Any], count: int) -> str:
    """Put what `summarize` returns for `head` and `finetuned` into one line; `count` is that of all test pictures."""
    if not summary["pairs"]:
        return "No test picture is nearly the same as a training picture."
    verb = "is" if summary["test_pictures"] == 1 else "are"
    line = f"{summary['test_pictures']} of {count} test pictures {verb} nearly the same as a training picture"
    if summary["head_accuracy"] is None:
        return f"{line}."
    return f"{line}; without them: head {summary['head_accuracy']:.2%}, fine-tuned {summary['finetuned_accuracy']:.2%}."


def write_near_duplicates(path: Path, pairs: list[Pair]) -> None:
    """Write `test,train,cosine`, whole or not at all; the header alone if there is no pair."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["test", "train", "cosine"])
    writer.writerows([pair.test, pair.train, f"{pair.cosine:.{_DECIMALS}f}"] for pair in pairs)
    write_text(path, text.getvalue())


def _whitening(features: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the mean (channels,) and the matrix (channels, channels) that make the features' variances alike.

    The median variance is added to each: those that are small are mostly noise, and there may be fewer pictures than
    channels. So is the variance of rounding, relative steps of `epsilon`: in bfloat16 it exceeds the median of the
    digits' variances, and copies at quality 80 have 0.97 with it, 0.53 without (medians).
    """
    mean = features.mean(dim=0)
    centred = features - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))
    real = variances[variances > _RANK_TOLERANCE * variances[-1]]
    added = real.median() if len(real) else torch.ones(())
    rounding = _ROUNDINGS * epsilon**2 * features.square().mean()
    return mean, directions / (variances.clamp(min=0) + added + rounding).sqrt()


def _unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1, float32; one of length 0 stays as it is, and so is like no other."""
    return functional.normalize(vectors).float()
