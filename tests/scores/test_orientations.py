"""Copies that are mirrored, turned or thumbnails: found by small grey pictures, and no two different pictures are."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits
from torch import nn

from data.digits import make
from stages.images.decode import decode
from stages.images.index import Entry
from stages.images.preprocessing import Preprocessing
from stages.scores.near_duplicates import Similar
from stages.scores.orientations import find_turned, join
from stages.scores.similarity import THRESHOLD
from stages.training.prefix import THUMBNAIL, FrozenPrefix
from stages.training.thumbnails import thumbnails_of

PHOTOS = os.environ.get("DVC_FINETUNE_PHOTOS")  # a folder of cats and one of dogs, 60 photos or more in each

KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "saved again": lambda picture: picture,
    "half": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
    "quarter": lambda picture: picture.resize((picture.width // 4, picture.height // 4)),
    "mirrored": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned by 90": lambda picture: picture.transpose(Image.Transpose.ROTATE_90),
    "turned by 180": lambda picture: picture.transpose(Image.Transpose.ROTATE_180),
    "turned by 270": lambda picture: picture.transpose(Image.Transpose.ROTATE_270),
    "mirrored and turned": lambda picture: picture.transpose(Image.Transpose.TRANSPOSE),
    "mirrored thumbnail": lambda picture: picture.resize((40, 40)).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "recoloured": lambda picture: ImageEnhance.Color(ImageEnhance.Brightness(picture).enhance(0.8)).enhance(0.6),
}


def make_scene(seed: int) -> Image.Image:
    """Spots of colour of all sizes, fainter the smaller they are, as in photos; 192 x 144."""
    random = np.random.default_rng(seed)
    scene = np.full((144, 192, 3), random.uniform(80, 170))
    for cells in (2, 4, 8, 16, 32):
        spots = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        scene += (np.asarray(spots.resize((192, 144), Image.Resampling.BICUBIC)) - 128.0) / cells
    return Image.fromarray(scene.clip(0, 255).astype(np.uint8))


def save(pictures: Iterable[Image.Image], folder: Path, suffix: str) -> list[Entry]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"{number:04d}{suffix}")
        picture.save(paths[-1], quality=80)
    return [Entry(str(path), 0, "cat", hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]


def find(train: list[Entry], test: list[Entry], image_size: int = 64) -> Similar:
    """Find copies through picture files, which have absolute paths."""
    preprocessing = Preprocessing(crop=image_size)
    like = FrozenPrefix(nn.Sequential(), Path("/"), preprocessing, torch.device("cpu"), "float32", 0)
    read = thumbnails_of([*train, *test], like, 1.0, 64)
    known = torch.cat(list(read(train)))
    assert known.shape == (len(train), THUMBNAIL, THUMBNAIL)
    return find_turned(known, [known], torch.cat(list(read(test))))


def pairs_of(found: Similar) -> set[tuple[int, int]]:
    assert all(THRESHOLD <= cosine <= 1.001 for *_, cosine in found.pairs)
    return {(row, column) for row, column, _ in found.pairs}


def test_each_kind_of_copy_is_found_and_nothing_else(tmp_path: Path) -> None:
    train = save((make_scene(seed) for seed in range(120)), tmp_path / "train", ".png")
    others = [make_scene(seed) for seed in range(1000, 1050)]
    copies = [change(make_scene(seed)) for seed, change in enumerate(KINDS.values())]
    found = find(train, save([*others, *copies], tmp_path / "test", ".jpg"))
    assert pairs_of(found) == {(50 + number, number) for number in range(len(KINDS))}
    assert found.count == len(KINDS)
    assert np.flatnonzero(found.paired).tolist() == list(range(50, 50 + len(KINDS)))


def test_different_digits_of_the_sample_are_not_copies_but_copies_are_found(tmp_path: Path) -> None:
    strokes = [make.make_stroke(image) for image in load_digits().images[:240]]
    digits = [make.photograph(strokes, number) for number in range(len(strokes))]
    train = save(digits[:200], tmp_path / "train", ".png")
    # A quarter of these pictures is 16 x 16: too little is left, as JPEG.
    kinds = [change for name, change in KINDS.items() if name != "quarter"]
    copies = [change(digits[number]) for number, change in enumerate(kinds)]
    found = find(train, save([*digits[200:], *copies], tmp_path / "test", ".jpg"))
    assert pairs_of(found) == {(40 + number, number) for number in range(len(kinds))}


def test_of_frames_of_few_scenes_the_copies_are_found(tmp_path: Path) -> None:
    """The backbone's features, whitened, tell saving again from moving a little no longer."""
    frames = []
    for number in range(200):
        x, y = np.random.default_rng(number).uniform(0, 12, 2)
        frames.append(make_scene(number % 5).transform((180, 132), Image.Transform.EXTENT, (x, y, x + 180, y + 132)))
    train = save(frames, tmp_path / "train", ".png")
    found = find(train, save(frames[:40], tmp_path / "test", ".jpg"))
    assert pairs_of(found) >= {(number, number) for number in range(40)}
    assert all(row % 5 == column % 5 for row, column in pairs_of(found))


@pytest.mark.skipif(not PHOTOS, reason="DVC_FINETUNE_PHOTOS is not set")
def test_copies_of_photos_are_found_and_different_photos_are_not(tmp_path: Path) -> None:
    folders = sorted(Path(PHOTOS or "").iterdir())
    paths = [path for folder in folders for path in sorted(folder.iterdir())[:60]]
    train = [Entry(str(path), 0, "cat", hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths[:-20]]
    copies = [change(decode(path.read_bytes())) for path, change in zip(paths, KINDS.values(), strict=False)]
    others = [decode(path.read_bytes()) for path in paths[-20:]]
    found = find(train, save([*others, *copies], tmp_path / "test", ".jpg"), image_size=224)
    assert pairs_of(found) == {(20 + number, number) for number in range(len(KINDS))}


def test_a_picture_that_is_its_own_mirror_image_is_one_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(count, 8, 8, generator=generator) for count in (100, 5))
    train[7] += train[7].flip(1)
    test[3] = train[7]
    found = find_turned(train, train.split(30), test)
    assert [pair[:2] for pair in found.pairs] == [(3, 7)]
    assert found.count == 1


def test_a_pair_found_twice_counts_once_with_its_highest_cosine() -> None:
    first = Similar([(0, 5, 0.92), (2, 1, 0.95)], 2, np.array([True, False, True]))
    second = Similar([(0, 5, 0.99), (0, 4, 0.91), (1, 1, 0.93)], 3, np.array([True, True, False]))
    joined = join([first, second])
    assert joined.pairs == [(0, 5, 0.99), (0, 4, 0.91), (1, 1, 0.93), (2, 1, 0.95)]
    assert joined.count == 4
    assert joined.paired.tolist() == [True, True, True]


def test_joined_pairs_of_a_picture_are_ten_at_most_and_all_are_counted() -> None:
    looks = [
        Similar([(0, 10 * look + number, 0.9 + number / 1000) for number in range(10)], 40, np.array([True]))
        for look in range(2)
    ]
    joined = join(looks)
    assert [cosine for *_, cosine in joined.pairs] == sorted((cosine for *_, cosine in joined.pairs), reverse=True)
    assert len(joined.pairs) == 10
    assert joined.count == 40
    assert join([Similar([], 0, np.zeros(2, dtype=bool))] * 2).count == 0
