"""Write scikit-learn's handwritten digits as PNG files, one folder for the even and one for the odd ones.

1,797 digits of 8 x 8 pixels, from the UCI "Optical Recognition of Handwritten Digits" set
(https://doi.org/10.24432/C50P49, CC BY 4.0). Even against odd: two classes, each of five shapes.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 64  # pixels
GREYS = 16  # the data set's own scale: 0 to 16


def main() -> None:
    """Write the pictures: dark ink on white paper."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    shutil.rmtree(output, ignore_errors=True)
    digits = load_digits()
    for number, (ink, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = output / ("odd" if digit % 2 else "even")
        folder.mkdir(parents=True, exist_ok=True)
        paper = Image.fromarray((255 * (1 - ink / GREYS)).round().astype(np.uint8))
        # A margin of one of the eight original pixels, so that no stroke touches the edge.
        picture = Image.new("L", (SIZE, SIZE), 255)
        inner = SIZE * 8 // 10
        picture.paste(paper.resize((inner, inner), Image.Resampling.BICUBIC), ((SIZE - inner) // 2,) * 2)
        picture.save(folder / f"{number:04d}_{digit}.png")


if __name__ == "__main__":
    main()
