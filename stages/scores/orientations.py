"""Which pictures are nearly the same, one of them mirrored, turned or a thumbnail: by their small grey versions."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from stages.scores.near_duplicates import Similar
from stages.scores.similarity import PAIRS_OF_A_PICTURE, find_similar

# A square can be turned by four angles, and be a mirror image or not.
_ORIENTATIONS = 8
# Variance of what saving again changes: four of 255 grey levels, in units of ImageNet's standard deviation. Photos vary
# more in all details; what soft pictures or frames of few scenes differ in would be less, and drowned by it.
_NOISE = (4 / 255 / 0.226) ** 2


def find_turned(sample: Tensor, train: Iterable[Tensor], test: Tensor) -> Similar:
    """Find the pairs of a test and a training picture that are nearly the same in one of the eight orientations.

    What is compared are small grey pictures, as in a perceptual hash, whitened as in `similarity.find_similar` and by
    the same threshold. A copy that is a thumbnail still has all of a small picture, and a small picture is turned at no
    cost, where a network would have to see each picture eight times. `docs/results.md` has what it finds.

    Args:
        sample: small pictures of training pictures, (k, side, side), from which the whitening is measured.
        train: those of all training pictures, in batches: (n, side, side) in all.
        test: likewise, (m, side, side).
    """
    flat = (pictures.flatten(1) for pictures in train)
    found = find_similar(sample.flatten(1), flat, _orientations(test).flatten(1), "float32", _NOISE)
    pairs = [(row % len(test), column, cosine) for row, column, cosine in found.pairs]
    paired = np.logical_or.reduce(found.paired.reshape(_ORIENTATIONS, len(test)))
    # A picture that is its own mirror image is found in more than one orientation: that is one pair.
    return join([Similar(pairs, -(-found.count // _ORIENTATIONS), paired)])


def join(looks: list[Similar]) -> Similar:
    """Join what was found among the same pictures in several ways; a pair that was found twice has its highest cosine.

    The count is that of all pairs, unless a test picture has more of them than are listed: then there may be more.
    """
    cosines: dict[tuple[int, int], float] = {}
    for row, column, cosine in (pair for look in looks for pair in look.pairs):
        cosines[row, column] = max(cosine, cosines.get((row, column), cosine))
    of_a_picture: dict[int, list[tuple[int, int, float]]] = {}
    for (row, column), cosine in sorted(cosines.items(), key=lambda item: (item[0][0], -item[1], item[0][1])):
        of_a_picture.setdefault(row, []).append((row, column, cosine))
    pairs = [pair for own in of_a_picture.values() for pair in own[:PAIRS_OF_A_PICTURE]]
    paired = np.logical_or.reduce([look.paired for look in looks])
    return Similar(pairs, max(len(cosines), *(look.count for look in looks)), paired)


def _orientations(pictures: Tensor) -> Tensor:
    """Return pictures (m, side, side) in all orientations, (8 * m, side, side), the pictures as they are first."""
    turned = [torch.rot90(pictures, quarters, (1, 2)) for quarters in range(4)]
    return torch.cat([*turned, *(picture.flip(2) for picture in turned)])
