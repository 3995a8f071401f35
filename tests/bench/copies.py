"""Measure which copies of pictures are found by `evaluate`, and which pairs are found that are none.

`python tests/bench/copies.py --pictures data/digits/images --checkpoint data/checkpoints/head.safetensors`. The first
200 pictures, in random order, are test pictures; training pictures are all others, and copies of the 200, of one kind
at a time. Then frames of a film: 46 of each of 20 pictures, moved, enlarged and lit a little differently; of 200 of
them a copy is among the others.
"""

import argparse
import hashlib
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageEnhance
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from stages.images.decode import decode
from stages.images.index import Entry
from stages.network.checkpoint import load_checkpoint
from stages.network.network import pool_features
from stages.scores.near_duplicates import Similar
from stages.scores.orientations import find_turned, join
from stages.scores.similarity import find_similar
from stages.training import cache
from stages.training.inputs import open_batches
from stages.training.prefix import FrozenPrefix
from stages.training.store import Kept
from stages.training.thumbnails import thumbnails_of

PLANTED = 200
SCENES, FRAMES = 20, 46
BATCH = 64
Change = Callable[[Image.Image, random.Random], Image.Image]
Pairs = set[tuple[int, int]]


def resize(fraction: float) -> Change:
    """Return what resizes both sides to a fraction."""
    return lambda picture, _: picture.resize(
        (max(1, round(fraction * picture.width)), max(1, round(fraction * picture.height)))
    )


def thumbnail(picture: Image.Image, _: random.Random) -> Image.Image:
    """Make the longer side 64 pixels."""
    small = picture.copy()
    small.thumbnail((64, 64))
    return small


def crop(fraction: float) -> Change:
    """Return what cuts out a part, at a random place, with sides of a fraction."""

    def cut(picture: Image.Image, chance: random.Random) -> Image.Image:
        width, height = round(fraction * picture.width), round(fraction * picture.height)
        x, y = chance.randint(0, picture.width - width), chance.randint(0, picture.height - height)
        return picture.crop((x, y, x + width, y + height))

    return cut


def recolour(picture: Image.Image, chance: random.Random) -> Image.Image:
    """Change the brightness by up to 30%, the saturation by up to 50%."""
    brighter = ImageEnhance.Brightness(picture).enhance(chance.uniform(0.7, 1.3))
    return ImageEnhance.Color(brighter).enhance(chance.uniform(0.5, 1.5))


def transpose(how: Image.Transpose) -> Change:
    """Return what turns or mirrors a picture."""
    return lambda picture, _: picture.transpose(how)


# Title, what is done, and the quality of the JPEG file in which the result is saved.
KINDS: list[tuple[str, Change, int]] = [
    ("saved again, JPEG quality 50", lambda picture, _: picture, 50),
    ("resized to a half", resize(0.5), 95),
    ("resized to a quarter", resize(0.25), 95),
    ("thumbnail, 64 px", thumbnail, 95),
    ("mirrored", transpose(Image.Transpose.FLIP_LEFT_RIGHT), 95),
    ("turned by 90 degrees", transpose(Image.Transpose.ROTATE_90), 95),
    ("turned by 180 degrees", transpose(Image.Transpose.ROTATE_180), 95),
    ("turned by 270 degrees", transpose(Image.Transpose.ROTATE_270), 95),
    ("brightness and saturation changed", recolour, 95),
    ("cropped to 95% of both sides", crop(0.95), 95),
    ("cropped to 80% of both sides", crop(0.8), 95),
]


@dataclass(frozen=True)
class Seen:
    """Pictures as they are compared: pooled features (n, channels), small pictures (n, side, side)."""

    features: Tensor
    small: Tensor

    def __add__(self, other: "Seen") -> "Seen":
        return Seen(torch.cat([self.features, other.features]), torch.cat([self.small, other.small]))

    def __getitem__(self, positions: slice | list[int]) -> "Seen":
        return Seen(self.features[positions], self.small[positions])


def see(paths: Iterable[Path], prefix: FrozenPrefix) -> Seen:
    """Let the backbone see pictures, and shrink them."""
    entries = [Entry(str(path), 0, "", hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
    features = [pool_features(batch.float()).cpu() for batch, *_ in open_batches(prefix, entries, Kept(), BATCH)]
    return Seen(torch.cat(features), torch.cat(list(thumbnails_of(entries, prefix, 1.0, BATCH)(entries))))


def save(pictures: Iterable[Image.Image], folder: Path, quality: int) -> list[Path]:
    """Save pictures as JPEG."""
    folder.mkdir()
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"{number:04d}.jpg")
        picture.save(paths[-1], quality=quality)
    return paths


def make_frames(picture: Image.Image, chance: random.Random) -> Iterator[Image.Image]:
    """Yield frames of a film of one picture: a camera that moves, a light that changes."""
    x, y, zoom, light = 0.5, 0.5, 0.9, 1.0
    for _ in range(FRAMES):
        x, y = (min(1.0, max(0.0, place + chance.uniform(-0.15, 0.15))) for place in (x, y))
        zoom = min(0.95, max(0.85, zoom + chance.uniform(-0.015, 0.015)))
        light = min(1.2, max(0.8, light + chance.uniform(-0.04, 0.04)))
        width, height = round(zoom * picture.width), round(zoom * picture.height)
        left, top = round(x * (picture.width - width)), round(y * (picture.height - height))
        yield ImageEnhance.Brightness(picture.crop((left, top, left + width, top + height))).enhance(light)


def compare(title: str, train: Seen, test: Seen, planted: Pairs, alike: Pairs) -> str:
    """Return a row: how many of the planted pairs are found in each way; the pairs that are not `alike` are false."""
    by_features = find_similar(train.features, [train.features], test.features, "float32")
    by_small = find_turned(train.small, [train.small], test.small)
    cells = [f"{len(pairs_of(found) & planted)}" for found in (by_features, by_small)]
    joined = pairs_of(join([by_features, by_small]))
    return f"| {title} | {' | '.join(cells)} | {len(joined & planted)} | {len(joined - alike)} |"


def pairs_of(found: Similar) -> Pairs:
    """Return the positions of the pairs."""
    return {(row, column) for row, column, _ in found.pairs}


def measure(paths: list[Path], prefix: FrozenPrefix, folder: Path) -> Iterator[str]:
    """Yield the rows of the table."""
    chance = random.Random(0)
    chance.shuffle(paths)
    test, others = see(paths[:PLANTED], prefix), see(paths[PLANTED:], prefix)
    planted = {(number, len(paths) - PLANTED + number) for number in range(PLANTED)}
    for number, (title, change, quality) in enumerate(KINDS):
        copies = (change(decode(path.read_bytes()), chance) for path in paths[:PLANTED])
        train = others + see(save(copies, folder / str(number), quality), prefix)
        yield compare(title, train, test, planted, planted)

    scenes = [decode(path.read_bytes()) for path in paths[-SCENES:]]
    frames = [frame for scene in scenes for frame in make_frames(scene, chance)]
    order = chance.sample(range(len(frames)), len(frames))
    chosen, rest = order[:PLANTED], order[PLANTED:]
    seen = see(save(frames, folder / "frames", 95), prefix)
    train = seen[rest] + see(save((frames[number] for number in chosen), folder / "again", 70), prefix)
    of_train = [number // FRAMES for number in [*rest, *chosen]]
    alike = {
        (row, column)
        for row, number in enumerate(chosen)
        for column, scene in enumerate(of_train)
        if scene == number // FRAMES
    }
    copies_of_frames = {(number, len(rest) + number) for number in range(PLANTED)}
    yield compare("film frames, JPEG quality 70", train, seen[chosen], copies_of_frames, alike)


def main() -> None:
    """Print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="folder with a folder of pictures per class")
    parser.add_argument("--checkpoint", type=Path, required=True, help="whose frozen backbone is used")
    options = parser.parse_args()
    network, description = load_checkpoint(options.checkpoint)
    cpu = torch.device("cpu")
    backbone: nn.Sequential = network.backbone
    prefix = FrozenPrefix(backbone, Path("/"), description.preprocessing, cpu, "float32", workers=2)
    paths = [path.resolve() for path in sorted(options.pictures.glob("*/*"))]
    print(f"| of {PLANTED} copies | by features | by small pictures | by either | false pairs |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        os.environ[cache.VARIABLE] = f"{name}/cache"
        for row in measure(paths, prefix, Path(name)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
