"""Measure which copies of images `split` finds, and which pairs it finds that are none.

`python tests/bench/copies.py --images data/digits/images`: of 200 images, in random order, copies of one kind at a time
are put among all images.
"""

import argparse
import io
import random
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageEnhance

sys.path.insert(0, str(Path(__file__).parents[2]))

from stages.images.decode import decode_with_facts
from stages.images.near_duplicates import SIDE, find_pairs, shrink

PLANTED = 200
Change = Callable[[Image.Image, random.Random], Image.Image]


def resize(fraction: float) -> Change:
    """Return what resizes both sides to a fraction."""
    return lambda image, _: image.resize(
        (max(1, round(fraction * image.width)), max(1, round(fraction * image.height)))
    )


def thumbnail(image: Image.Image, _: random.Random) -> Image.Image:
    """Make the longer side 64 pixels."""
    small = image.copy()
    small.thumbnail((64, 64))
    return small


def crop(fraction: float) -> Change:
    """Return what cuts out a part, at a random place, with sides of a fraction."""

    def cut(image: Image.Image, chance: random.Random) -> Image.Image:
        width, height = round(fraction * image.width), round(fraction * image.height)
        x, y = chance.randint(0, image.width - width), chance.randint(0, image.height - height)
        return image.crop((x, y, x + width, y + height))

    return cut


def recolour(image: Image.Image, chance: random.Random) -> Image.Image:
    """Change the brightness by up to 30%, the saturation by up to 50%."""
    brighter = ImageEnhance.Brightness(image).enhance(chance.uniform(0.7, 1.3))
    return ImageEnhance.Color(brighter).enhance(chance.uniform(0.5, 1.5))


def transpose(how: Image.Transpose) -> Change:
    """Return what turns or mirrors an image."""
    return lambda image, _: image.transpose(how)


# Title, what is done, and the quality of the JPEG file in which the result is saved.
KINDS: list[tuple[str, Change, int]] = [
    ("saved again, JPEG quality 50", lambda image, _: image, 50),
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


def small(content: bytes) -> bytes:
    """Return the small version that `split` makes of a file."""
    decoded = decode_with_facts(content, least=SIDE)
    return shrink(decoded.image, *decoded.size)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    paths = sorted(path for path in parser.parse_args().images.rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    random.Random(0).shuffle(paths)
    contents = [path.read_bytes() for path in paths]
    known = [small(content) for content in contents]
    among = {pair[:2] for pair in find_pairs(known)}
    print(f"{len(among)} pairs among {len(known):,} images\n\n| | found | others found |\n|---|---:|---:|")
    for title, change, quality in KINDS:
        chance, copies = random.Random(1), []
        for content in contents[:PLANTED]:
            file = io.BytesIO()
            change(decode_with_facts(content).image, chance).save(file, "JPEG", quality=quality)
            copies.append(small(file.getvalue()))
        found = {pair[:2] for pair in find_pairs(known + copies)} - among
        planted = {(number, len(known) + number) for number in range(len(copies))}
        print(f"| {title} | {len(found & planted)} | {len(found - planted)} |", flush=True)


if __name__ == "__main__":
    main()
