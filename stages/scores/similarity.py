"""Which pictures are nearly the same, by what a backbone makes of them."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stages.common import ranks
from stages.common.device import dtype_of
from stages.common.params import Precision
from stages.scores.near_duplicates import Similar

# See `find_similar` for what was measured.
THRESHOLD = 0.9
# So many pairs are kept of each test picture.
PAIRS_OF_A_PICTURE = 10
# So many training pictures are enough to measure how features vary.
_SAMPLE = 10_000
# Eigenvalues below this fraction of the largest are rounding.
_RANK_TOLERANCE = 1e-9
# How many times the rounding of one operation: that of all of a network's.
_ROUNDINGS = 10
# Test and training pictures compared at once: their cosines fit into a processor's cache.
_BLOCK, _CHUNK = 512, 4096
# Random directions in which two pictures are compared first.
_DIRECTIONS = 64
# Pairs below this cosine in these directions are below `THRESHOLD` in all. It is a correlation of normal samples, whose
# inverse hyperbolic tangent has a standard deviation of 1 / sqrt(samples - 2) (Fisher 1921, known means); five of them.
_LIKELY = math.tanh(math.atanh(THRESHOLD) - 5 / math.sqrt(_DIRECTIONS - 2))

_Item = TypeVar("_Item")


def thin(items: list[_Item]) -> list[_Item]:
    """Return at most 10,000 items, evenly spread."""
    return items[:: -(-len(items) // _SAMPLE) or 1]


def read_sample(read: Callable[[list[_Item]], Iterable[Tensor]], items: list[_Item]) -> tuple[Tensor, Iterable[Tensor]]:
    """Return the `sample` and the `train` of `find_similar`: of some items (`thin`), and of all.

    Args:
        read: items -> their features in batches.
        items: the training pictures.
    """
    some = thin(items)
    sample = torch.cat(list(read(some)))
    return sample, [sample] if len(some) == len(items) else read(items)


def find_similar(
    sample: Tensor, train: Iterable[Tensor], test: Tensor, precision: Precision, noise: float = 0.0
) -> Similar:
    """Find the pairs of a test and a training picture whose whitened features have a cosine of `THRESHOLD` or more.

    Whitening: the mean of the training features is subtracted, and all directions in which they vary get about the same
    weight. Features of different pictures have much in common; what distinguishes two pictures of one kind is small in
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

    All pairs are compared, first in 64 random directions, which costs a fifteenth; only pictures that are alike in
    these are compared in full. Of pairs with a cosine of just 0.9, one in a million is missed so, and fewer of those
    that are more alike. The memory needed grows with m alone. Of several processes each takes a part of the test
    pictures, and all return the same.

    Args:
        sample: pooled features of training pictures, (k, channels), from which the whitening is measured.
        train: those of all training pictures, in batches: (n, channels) in all.
        test: likewise, (m, channels).
        precision: what the network computed in.
        noise: variance of what differs between copies in each channel, where that is known.
    """
    mean, whitening = _whitening(sample.double(), torch.finfo(dtype_of(precision)).eps, noise)
    own = test[ranks.rank() :: ranks.count()]
    asked = torch.empty_like(own)
    for first in range(0, len(own), _CHUNK):
        rows = slice(first, first + _CHUNK)
        asked[rows] = _unit((own[rows].double() - mean) @ whitening)
    directions = _directions(test.shape[1])
    asked_in_short = _unit(asked @ directions)
    best, column = _Best(len(own)), 0
    for features in _chunks(train):
        known = _unit((features.double() - mean) @ whitening)
        known_in_short = _unit(known @ directions)
        for first in range(0, len(asked), _BLOCK):
            rows = slice(first, first + _BLOCK)
            likely = (asked_in_short[rows] @ known_in_short.T).amax(dim=0) >= _LIKELY
            columns = likely.nonzero().squeeze(1)
            best.add(rows, column + columns, asked[rows] @ known[columns].T)
        column += len(known)
    return _put_together(ranks.gather(best.similar()), len(test))


def _put_together(parts: list[Similar], count: int) -> Similar:
    """Join what each of n processes found of its share of `count` test pictures, which is every n-th."""
    paired, pairs = np.zeros(count, dtype=bool), []
    for number, part in enumerate(parts):
        paired[number :: len(parts)] = part.paired
        pairs += [(row * len(parts) + number, column, cosine) for row, column, cosine in part.pairs]
    return Similar(sorted(pairs, key=lambda pair: pair[0]), sum(part.count for part in parts), paired)


class _Best:
    """Of each of `count` test pictures, the training pictures most like it so far, and the number of all pairs."""

    def __init__(self, count: int) -> None:
        self.cosines = torch.full((count, PAIRS_OF_A_PICTURE), -math.inf)
        self.columns = torch.zeros(self.cosines.shape, dtype=torch.int64)
        self.count = 0

    def add(self, rows: slice, columns: Tensor, cosines: Tensor) -> None:
        """Take the cosines (r, c) of some test pictures with training pictures at later positions than before, (c,)."""
        alike = cosines >= THRESHOLD
        if not alike.any():
            return
        self.count += int(alike.sum())
        candidates = torch.cat([self.cosines[rows], cosines.masked_fill(~alike, -math.inf)], dim=1)
        positions = torch.cat([self.columns[rows], columns.expand(len(cosines), -1)], dim=1)
        # Stable: of equal ones the first stay, however the pictures come in blocks.
        ordered, order = candidates.sort(dim=1, descending=True, stable=True)
        self.cosines[rows] = ordered[:, :PAIRS_OF_A_PICTURE]
        self.columns[rows] = positions.gather(1, order[:, :PAIRS_OF_A_PICTURE])

    def similar(self) -> Similar:
        """Return the pairs."""
        found = self.cosines >= THRESHOLD
        values = (found.nonzero()[:, 0], self.columns[found], self.cosines[found])
        pairs = list(zip(*(column.tolist() for column in values), strict=True))
        return Similar(pairs, self.count, found.any(dim=1).numpy())


def _chunks(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Join small batches until they have 4,096 rows or more."""
    held: list[Tensor] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= _CHUNK:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _directions(channels: int) -> Tensor:
    """Return random directions, (channels, 64), always the same; all directions where there are no more than that."""
    if channels <= _DIRECTIONS:
        return torch.eye(channels)
    return torch.randn(channels, _DIRECTIONS, generator=torch.Generator().manual_seed(0))


def _whitening(features: Tensor, epsilon: float, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the mean (channels,) and the matrix (channels, channels) that make the features' variances alike.

    The median variance is added to each: those that are small are mostly noise, and there may be fewer pictures than
    channels. So is the variance of rounding, relative steps of `epsilon`: in bfloat16 it exceeds the median of the
    digits' variances, and copies at quality 80 have 0.97 with it, 0.53 without (medians). `noise` is added too.
    """
    mean = features.mean(dim=0)
    centred = features - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))
    real = variances[variances > _RANK_TOLERANCE * variances[-1]]
    added = real.median() if len(real) else torch.ones(())
    rounding = _ROUNDINGS * epsilon**2 * features.square().mean()
    return mean, directions / (variances.clamp(min=0) + added + rounding + noise).sqrt()


def _unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1, float32; one of length 0 stays as it is, and so is like no other."""
    return functional.normalize(vectors).float()
