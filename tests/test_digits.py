"""The bundled sample."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data.digits import make


def test_every_digit_becomes_one_image_in_the_folder_of_its_parity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make.py", "--output", str(tmp_path / "images")])
    make.main()
    images = sorted((tmp_path / "images").rglob("*.png"), key=lambda path: path.name)
    digits = load_digits().target.tolist()
    assert [int(path.stem.partition("_")[2]) for path in images] == digits
    assert [path.parent.name for path in images] == ["odd" if digit % 2 else "even" for digit in digits]
    assert all(Image.open(path).mode == "RGB" and Image.open(path).size == (make.SIZE,) * 2 for path in images)


def test_an_image_depends_only_on_its_number() -> None:
    strokes = [make.make_stroke(image) for image in load_digits().images[:20]]
    first = [make.photograph(strokes, number).tobytes() for number in range(5)]
    assert [make.photograph(strokes, number).tobytes() for number in reversed(range(5))] == first[::-1]
    assert len(set(first)) == 5


def test_the_labelled_digit_is_in_the_middle() -> None:
    # Without neighbours the ink in the middle third stays; they touch the edges only.
    digits = load_digits().images[:40]
    alone = [make.make_stroke(image) for image in digits]
    for number in range(40):
        blank = [make.make_stroke(0 * digits[0])] * 40
        blank[number] = alone[number]
        difference = abs(
            np.asarray(make.photograph(alone, number), dtype=float)
            - np.asarray(make.photograph(blank, number), dtype=float)
        )
        middle = difference[24:40, 24:40].mean()
        assert middle < 1, number
