"""Near-duplicates by small grey versions: images saved again, resized, recoloured, mirrored or rotated."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.common.format import enumerate_names, plural
from stages.images.index import NEAR, Entry

Floats = NDArray[np.float32]

SIDE = 16  # of a small version, pixels
# docs/pictures.md has the measurements.
THRESHOLD = 0.965
LARGEST_GROUP = 50
LOOKED_FOR = (
    "Looked for: copies that were saved again, made smaller, recoloured, mirrored or turned by 90, 180 or 270 degrees; "
    "not: cropped ones, and images with hardly any contrast."
)
# Weights of the frequencies of a small version: images have less power at high frequencies, but differ there, too.
_POWER, _HIGHEST = 1.3, 11
_FLAT = 1.0  # a standard deviation of grey levels below this is noise
# Rounds, each of which sorts all orientations of all images by 64 signs, and the neighbours compared in each.
_LOOKS, _NEIGHBOURS = 4, 4
_MOST_DIFFERENT = 14  # among 64 signs; the mean at THRESHOLD is 5.4
_AT_ONCE = 2**16
_ROW, _COLUMN = np.mgrid[:SIDE, :SIDE]
_FREQUENCY = np.hypot(_ROW, _COLUMN).astype(np.float32)
# The first vectors of a cosine transform are sqrt(2) times as long as the others.
_LENGTHS = np.sqrt((1 + (_ROW > 0)) * (1 + (_COLUMN > 0)) / 4).astype(np.float32)
_WEIGHTS = np.where(_FREQUENCY <= _HIGHEST, _FREQUENCY**_POWER, 0) * _LENGTHS
_USED = np.nonzero(_WEIGHTS)
_TRANSPOSED = np.lexsort((_USED[0], _USED[1]))
# Mirroring an image changes the sign of its odd frequencies in that direction.
_SIGNS = (-1.0) ** np.stack([np.zeros_like(_USED[0]), _USED[0], _USED[1], _USED[0] + _USED[1]]).astype(np.float32)


class Pair(NamedTuple):
    """Positions of two near-duplicates, and the cosine of their weighted frequencies."""

    first: int
    second: int
    cosine: float


@dataclass(frozen=True)
class Leak:
    """A test image and a near-duplicate of it in training or validation."""

    test: str
    train: str
    cosine: float


def shrink(image: Image.Image, width: int, height: int) -> bytes:
    """Return a small grey version of an RGB image; `width` and `height` are those in its file."""
    factor = -(-max(width, height) // max(image.size))
    # libjpeg rounds sizes up: the last row and column may cover fewer pixels than the others.
    box = (0, 0, min(width / factor, image.width), min(height / factor, image.height))
    return image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR, box, reducing_gap=3.0).tobytes()


def find_pairs(small: list[bytes]) -> list[Pair]:
    """Find the pairs of images whose cosine is `THRESHOLD` or more in one of the eight orientations, the highest first.

    Only neighbours in an order by hash are compared, so the time is linear in the number of images. Among a million
    images, about 1% of the pairs at the threshold are missed. Images without contrast are not compared.
    """
    vectors, rows = _weigh(small)
    if not len(vectors):
        return []
    candidates = np.unique(np.concatenate([_neighbours(vectors, np.random.default_rng(n)) for n in range(_LOOKS)]))
    pairs: list[Pair] = []
    for start in range(0, len(candidates), _AT_ONCE):
        first, second = np.divmod(candidates[start : start + _AT_ONCE], len(vectors))
        cosines = _highest_cosines(vectors[first], vectors[second])
        found = cosines >= THRESHOLD
        pairs += map(Pair, rows[first[found]].tolist(), rows[second[found]].tolist(), cosines[found].tolist())
    return sorted(pairs, key=lambda pair: (-pair.cosine, pair.first, pair.second))


def count_flat(small: list[bytes]) -> int:
    """Return how many images have too little contrast to be compared."""
    return len(small) - len(_weigh(small)[1])


def form_groups(hashes: list[str], pairs: list[Pair]) -> dict[str, str]:
    """Return SHA-256 -> the name of its group, for images with near-duplicates.

    Pairs are joined in order; one that would form a group larger than `LARGEST_GROUP` is skipped.
    """
    groups = {position: [position] for pair in pairs for position in (pair.first, pair.second)}
    for pair in pairs:
        one, other = groups[pair.first], groups[pair.second]
        if one is not other and len(one) + len(other) <= LARGEST_GROUP:
            one += other
            groups.update(dict.fromkeys(other, one))
    name_of = {id(group): NEAR + min(hashes[position] for position in group) for group in groups.values()}
    return {hashes[position]: name_of[id(group)] for position, group in groups.items() if len(group) > 1}


def find_leaks(pairs: list[Pair], images: list[Entry], part_of: dict[str, str]) -> list[Leak]:
    """Return the pairs of a test image and another part's, most similar first; `part_of`: path -> part."""
    paths = [(images[pair.first].path, images[pair.second].path, round(pair.cosine, 4)) for pair in pairs]
    leaks = [
        Leak(test, other, cosine)
        for first, second, cosine in paths
        for test, other in ((first, second), (second, first))
        if part_of[test] == "test" != part_of[other]
    ]
    return sorted(leaks, key=lambda leak: (-leak.cosine, leak.test, leak.train))


def describe_near_duplicates(
    pairs: list[Pair], images: list[Entry], together: Mapping[str, str], leaks: list[Leak], flat: int
) -> list[str]:
    """Report how many images are near-duplicates, how many are kept together, and contradictory labels.

    `together`: SHA-256 -> group of images kept in one part; `flat`: number of images that could not be compared.
    """
    notes = [f"{plural(flat, 'image')} with too little contrast to look for near-duplicates"] * bool(flat)
    if together:
        sizes = Counter(together.values())
        notes.append(
            f"{len(together):,} images in {plural(len(sizes), 'group')} (at most {max(sizes.values())}) are nearly the "
            "same, kept in one part"
        )
    if (tested := len({leak.test for leak in leaks})) or (pairs and not together):
        notes.append(f"{plural(tested, 'test image is', 'test images are')} nearly the same as one of another part")
    couples = [(images[one], images[other]) for one, other, _ in pairs]
    if contrary := [f"{one.path} and {other.path}" for one, other in couples if one.class_name != other.class_name]:
        notes.append(f"{plural(len(contrary), 'pair')} nearly the same in two classes ({enumerate_names(contrary, 1)})")
    if 10 * len({entry.path for couple in couples for entry in couple}) > len(images):
        notes.append("many are nearly the same: is it one scene or burst? split.group keeps that together")
    return notes


def _weigh(small: list[bytes]) -> tuple[Floats, NDArray[np.int64]]:
    """Return unit vectors of weighted frequencies of images with contrast, and the positions of these images."""
    place = np.arange(SIDE)
    transform = np.cos(np.pi * place[:, None] * (2 * place + 1) / (2 * SIDE)).astype(np.float32)
    vectors, rows = [np.empty((0, SIDE, SIDE), np.float32)], [np.empty(0, np.int64)]
    for start in range(0, len(small), _AT_ONCE):
        grey = np.frombuffer(b"".join(small[start : start + _AT_ONCE]), np.uint8).reshape(-1, SIDE, SIDE)
        clear = grey.std(axis=(1, 2)) >= _FLAT
        weighted = (transform @ grey[clear].astype(np.float32) @ transform.T) * _WEIGHTS
        vectors.append(weighted / np.linalg.norm(weighted, axis=(1, 2), keepdims=True))
        rows.append(start + np.flatnonzero(clear))
    return np.concatenate(vectors)[:, _USED[0], _USED[1]], np.concatenate(rows)


def _orientations(vectors: Floats) -> Iterator[Floats]:
    """Yield the vectors (n, d) of the mirrored and rotated images: frequencies change signs, or are transposed."""
    for order in (np.arange(len(_TRANSPOSED)), _TRANSPOSED):
        for sign in _SIGNS:
            yield (vectors * sign)[:, order]


def _highest_cosines(one: Floats, other: Floats) -> Floats:
    """Return the highest cosine of each pair of vectors, (n, d), over the orientations of the second one, (n,)."""
    straight = (one * other) @ _SIGNS.T
    turned = (one * other[:, _TRANSPOSED]) @ _SIGNS[:, _TRANSPOSED].T
    highest: Floats = np.maximum(straight, turned).max(axis=1)
    return highest


def _neighbours(vectors: Floats, random: np.random.Generator) -> NDArray[np.int64]:
    """Return candidate pairs, first * n + second with first < second, that agree in most of 64 signs."""
    count = len(vectors)
    directions = random.standard_normal((64, vectors.shape[1]), dtype=np.float32)
    # Without these directions, which all images share, or all would have the same signs.
    common, _ = np.linalg.qr(np.concatenate(list(_orientations(vectors.mean(axis=0, keepdims=True)))).T)
    directions -= directions @ common @ common.T
    every = np.concatenate(list(_orientations(directions)))
    keys = np.empty((count, 8), np.uint64)
    for start in range(0, count, _AT_ONCE):
        signs = vectors[start : start + _AT_ONCE] @ every.T > 0
        keys[start : start + _AT_ONCE] = np.packbits(signs, axis=1).view(">u8")
    order = np.argsort(keys, axis=None)
    ordered, images = keys.reshape(-1)[order], order // 8
    found = []
    for step in range(1, _NEIGHBOURS + 1):
        alike = np.bitwise_count(ordered[step:] ^ ordered[:-step]) <= _MOST_DIFFERENT
        one, other = images[step:][alike], images[:-step][alike]
        found.append((np.minimum(one, other) * count + np.maximum(one, other))[one != other])
    return np.unique(np.concatenate(found))
