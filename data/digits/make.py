"""Write scikit-learn's handwritten digits as if each had been photographed: one folder for even, one for odd ones.

1,797 digits of 8 x 8 pixels, from the UCI "Optical Recognition of Handwritten Digits" set
(https://doi.org/10.24432/C50P49, CC BY 4.0). Even against odd: two classes, each of five shapes. Each digit is turned,
scaled and placed at random, in some ink on ruled, squared or plain paper (or in chalk on a board), with a piece of its
neighbours in the picture, light from one side, blur and noise. All of it hangs on the digit's number alone.
"""

import argparse
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 64  # pixels, of a picture
FINE = 2 * SIZE  # pixels, while drawing: made smaller at the end, so that edges are smooth
GREYS = 16  # the data set's own scale: 0 to 16
SEED = 0

INKS = ((25, 25, 30), (30, 45, 120), (20, 60, 160), (150, 30, 40), (30, 90, 60), (80, 80, 85))
PAPERS = ((250, 250, 248), (244, 238, 220), (252, 244, 170), (226, 232, 240), (214, 206, 190), (240, 220, 225))
LINES = ((150, 180, 220), (190, 190, 195), (215, 160, 165))
CHALKS = ((240, 240, 235), (245, 230, 140), (240, 180, 190), (170, 215, 245))
BOARDS = ((35, 60, 48), (40, 42, 46), (30, 45, 80))

Floats = npt.NDArray[np.float64]


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    shutil.rmtree(output, ignore_errors=True)
    for name in ("even", "odd"):
        (output / name).mkdir(parents=True)
    shares = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(shares) as pool:
        list(pool.map(write_share, repeat(output), range(shares), repeat(shares)))


def write_share(output: Path, first: int, step: int) -> None:
    """Write every `step`th picture from number `first` on."""
    digits = load_digits()
    strokes = [make_stroke(image) for image in digits.images]
    for number in range(first, len(strokes), step):
        digit = digits.target[number]
        picture = photograph(strokes, number)
        picture.save(output / ("odd" if digit % 2 else "even") / f"{number:04d}_{digit}.png")


def make_stroke(image: Floats) -> Image.Image:
    """Make the stroke of a pen out of 8 x 8 pixels: a mask of FINE x FINE, 255 where there is ink."""
    coarse = Image.fromarray((255 * image / GREYS).astype(np.uint8))
    smooth = np.asarray(coarse.resize((FINE, FINE), Image.Resampling.BICUBIC), dtype=float) / 255
    return Image.fromarray((255 * np.clip((smooth - 0.42) * 5 + 0.5, 0, 1)).astype(np.uint8))


def photograph(strokes: list[Image.Image], number: int) -> Image.Image:
    """Make the picture of one digit, RGB of SIZE x SIZE."""
    random = np.random.default_rng([SEED, number])
    scene = draw_paper(random)
    board = scene.mean() < 110
    ink = np.array(random.choice(CHALKS if board else INKS), dtype=float) + random.uniform(-15, 15, 3)
    strength = random.uniform(0.7, 1.0)

    height, angle = random.uniform(0.55, 0.85), random.uniform(-12, 12)  # of the picture; degrees
    x, y = random.uniform(-0.3, 0.3, 2) * (1 - height)
    mask = place(strokes[number], height, angle, x, y)
    across, down = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    for side in (-1, 1):
        if random.random() < 0.1:
            neighbour = strokes[random.integers(len(strokes))]
            # Far enough for the edge to cut it: the digit in the middle is the one meant.
            distance = max(0.8 * height, 0.5 - side * x) + random.uniform(0, 0.1)
            mask = np.maximum(
                mask, place(neighbour, height, angle, x + side * distance * across, y + side * distance * down)
            )
    scene += strength * mask[..., None] * (ink - scene)

    rows, columns = np.mgrid[-1 : 1 : FINE * 1j, -1 : 1 : FINE * 1j]
    towards = random.uniform(0, 2 * np.pi)
    light = 1 + random.uniform(0, 0.35) * (np.cos(towards) * columns + np.sin(towards) * rows)
    scene = scene * light[..., None] * random.uniform(0.7, 1.05)
    picture = to_image(scene).resize((SIZE, SIZE), Image.Resampling.BOX)
    blurred = picture.resize((SIZE // 2, SIZE // 2), Image.Resampling.BOX).resize(
        (SIZE, SIZE), Image.Resampling.BICUBIC
    )
    soft = Image.blend(picture, blurred, random.uniform(0, 1))
    noise = random.normal(0, random.uniform(2, 6), (SIZE, SIZE, 3))
    return to_image(np.asarray(soft, dtype=float) + noise)


def draw_paper(random: np.random.Generator) -> Floats:
    """Draw paper or a board, plain, ruled or squared: values 0 to 255, (FINE, FINE, 3)."""
    board = random.random() < 0.2
    base = np.array(random.choice(BOARDS if board else PAPERS), dtype=float) + random.uniform(-6, 6, 3)
    paper = np.broadcast_to(base, (FINE, FINE, 3)).copy()
    kind = random.choice(("plain", "ruled", "squared"), p=(0.75, 0.125, 0.125))
    if kind == "plain":
        return paper
    line = np.array(random.choice(LINES), dtype=float)
    pitch, width, angle = random.uniform(18, 40), random.uniform(1.5, 3), np.deg2rad(random.uniform(-25, 25))
    rows, columns = np.mgrid[0:FINE, 0:FINE]
    across = np.cos(angle) * rows + np.sin(angle) * columns
    along = np.cos(angle) * columns - np.sin(angle) * rows
    lined = (across + random.uniform(0, pitch)) % pitch < width
    if kind == "squared":
        lined |= (along + random.uniform(0, pitch)) % pitch < width
    paper[lined] += random.uniform(0.1, 0.3) * (line - paper[lined])
    return paper


def place(stroke: Image.Image, height: float, angle: float, x: float, y: float) -> Floats:
    """Turn, scale and move a stroke.

    Args:
        stroke: a mask of FINE x FINE.
        height: of the result, 1 is the picture's.
        angle: degrees, clockwise.
        x: of its middle, from the picture's middle, in units of the picture.
        y: likewise.

    Returns:
        (FINE, FINE), 1 where there is ink.
    """
    turn = np.deg2rad(angle)
    cos, sin = np.cos(turn) / height, np.sin(turn) / height
    middle = FINE / 2
    to_x, to_y = middle + x * FINE, middle + y * FINE
    back = (cos, sin, middle - cos * to_x - sin * to_y, -sin, cos, middle + sin * to_x - cos * to_y)
    moved = stroke.transform((FINE, FINE), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
    return np.asarray(moved, dtype=float) / 255


def to_image(values: Floats) -> Image.Image:
    """Round values to an RGB image, those beyond 0 to 255 cut off."""
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
