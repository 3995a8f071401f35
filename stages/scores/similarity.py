"""Which pictures are nearly the same, by what a backbone makes of them."""

import torch
from torch import Tensor
from torch.nn import functional

from stages.common.device import dtype_of
from stages.common.params import Precision

# See `find_similar` for what was measured.
THRESHOLD = 0.9
# Eigenvalues below this fraction of the largest are rounding.
_RANK_TOLERANCE = 1e-9
# How many times the rounding of one operation: that of all of a network's.
_ROUNDINGS = 10
_BLOCK = 512


def pool(activations: Tensor) -> Tensor:
    """Return the mean over space: (n, channels, height, width) -> (n, channels), float32, on the CPU."""
    return activations.float().flatten(2).mean(2).cpu()


def find_similar(train: Tensor, test: Tensor, precision: Precision) -> list[tuple[int, int, float]]:
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
    mean, whitening = _whitening(train.double(), torch.finfo(dtype_of(precision)).eps)
    known, asked = (_unit((features.double() - mean) @ whitening) for features in (train, test))
    pairs = []
    for first in range(0, len(asked), _BLOCK):
        cosines = asked[first : first + _BLOCK] @ known.T
        for row, column in (cosines >= THRESHOLD).nonzero().tolist():
            pairs.append((first + row, column, cosines[row, column].item()))
    return pairs


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
