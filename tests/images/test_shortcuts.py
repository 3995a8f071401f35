"""What tells the classes apart without showing anything is said: format, mode, camera, size, brightness."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Project
from making import said
from PIL import Image


def redraw(project: Project, save: Callable[[Image.Image, Path, bool], None]) -> None:
    """Draw the same noise for both classes, and save each image by its class."""
    drawn = np.random.default_rng(0)
    for path in sorted(project.path("images").rglob("*.png")):
        size = tuple(drawn.integers(30, 50, 2))
        image = Image.fromarray(drawn.integers(0, 255, (*size, 3), dtype=np.uint8))
        path.unlink()
        save(image, path, path.parent.name == "cat")


def camera(name: str) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0110] = name
    return exif


@pytest.mark.parametrize(
    ("save", "fact"),
    [
        (lambda image, path, cat: image.save(path.with_suffix(".png" if cat else ".jpg")), "file format"),
        (lambda image, path, cat: image.save(path, "PNG" if cat else "WEBP"), "file format"),
        (lambda image, path, cat: (image.convert("L") if cat else image).save(path), "colour mode"),
        (lambda image, path, cat: image.save(path, exif=camera("A" if cat else "B")), "camera (EXIF)"),
        (lambda image, path, cat: image.resize((256, 200) if cat else (200, 256)).save(path), "size"),
        (lambda image, path, cat: image.point(lambda value: value // (2 if cat else 1)).save(path), "mean brightness"),
    ],
)
def test_a_planted_shortcut_is_reported(
    project: Project, save: Callable[[Image.Image, Path, bool], None], fact: str
) -> None:
    redraw(project, save)
    line = said(project)
    right = "97.50%" if fact == "mean brightness" else "100.00%"
    assert f"{fact} alone tells the classes apart ({right} right, 50.00% by always the same)" in line
    assert any(fact in note for note in project.split_report()["notes"])


def test_one_class_of_many_that_is_stored_differently_is_named(project: Project) -> None:
    for name in ("fox", "hen", "owl"):
        project.path(f"images/{name}").mkdir()
        for path in project.path("images/dog").iterdir():
            (project.path(f"images/{name}") / path.name).write_bytes(path.read_bytes())
    redraw(project, lambda image, path, cat: image.save(path.with_suffix(".bmp" if cat else ".png")))
    assert "file format alone tells cat from the other classes" in said(project)


def test_images_that_are_stored_alike_give_no_warning(project: Project) -> None:
    redraw(project, lambda image, path, _: image.save(path))
    assert "alone tells" not in said(project)


def test_classes_with_the_same_images_in_two_forms_are_named(project: Project) -> None:
    drawn = np.random.default_rng(0)
    for path in sorted(project.path("images/cat").iterdir()):
        top = drawn.integers(30, 255)
        image = Image.fromarray(drawn.integers(0, top, (40, 40, 3), dtype=np.uint8))
        image.save(path)
        image.resize((20, 20)).save(project.path("images/dog") / path.name)
    note = "cat and dog hold 20 images of the same names that are as bright one by one: forms of the same images?"
    assert note in said(project)
    for number, path in enumerate(sorted(project.path("images/dog").iterdir())):
        path.rename(path.with_name(f"{(number + 7) % 20:03d}.x.png"))
    for path in project.path("images/dog").iterdir():
        path.rename(path.with_name(path.name.replace(".x", "")))
    assert "of the same names" not in said(project)
