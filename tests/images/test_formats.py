"""What a data set's images are: formats that need a package, grey with fewer bits, shapes that a crop would cut."""

import numpy as np
import pytest
import torch
from conftest import Project
from making import Refusal, said
from PIL import Image

from stages.images import decode
from stages.images.batches import read_entry
from stages.images.preprocessing import Preprocessing, make_transform
from stages.network.checkpoint import load_checkpoint

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where pillow-heif is not installed."""
    monkeypatch.setattr(decode, "_HEIF", False)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])


@pytest.mark.usefixtures("without_heif")
@pytest.mark.parametrize("name", ["{}.heic", "{}.HEIF", "{}.jpg"])
def test_many_heic_files_without_their_package_are_refused_with_what_to_install(
    project: Project, refusal: Refusal, name: str
) -> None:
    for number in range(24):
        project.path("images/cat").joinpath(name.format(number)).write_bytes(HEIC + bytes([number]))
    said = refusal(project, "split")
    assert f"images/cat holds 24 {name[2:].lower()} files in HEIC" in said
    assert "pip install pillow-heif" in said


@pytest.mark.usefixtures("without_heif")
def test_a_single_heic_file_is_left_out_with_its_reason(project: Project) -> None:
    project.path("images/cat/a.heic").write_bytes(HEIC)
    assert project.run("split") == 0
    reason = "HEIC, which needs `pip install pillow-heif`"
    assert project.split_report()["rejected"] == [{"path": "cat/a.heic", "reason": reason}]


def make_grey(project: Project, top: int, folder: str = "cat") -> None:
    for number in range(3):
        values = np.linspace(0, top - number, 40 * 40).reshape(40, 40).astype(np.uint16)
        Image.fromarray(values).save(project.path(f"images/{folder}/grey {number}.png"))


@pytest.mark.parametrize(("top", "full"), [(3900, 4095), (16383, 16383)])
def test_grey_of_fewer_bits_is_reported_with_the_key_which_then_reaches_the_network(
    project: Project, top: int, full: int
) -> None:
    make_grey(project, top)
    line = said(project)
    assert f"3 images of 16-bit grey dark, with values up to {top:,} of 65,535 only (data.grey_max={full} uses" in line
    project.set("data.grey_max", full)
    assert "16-bit grey" not in said(project)
    assert project.run("build_model") == 0
    grey_max = load_checkpoint(project.checkpoint("initial"))[1].preprocessing.grey_max
    grey = next(entry for part in project.parts().values() for entry in part if "grey" in entry.path)
    assert read_entry(project.path("images"), grey, grey_max).getextrema()[0][1] > 230


def test_grey_that_uses_nearly_all_bits_is_not_reported(project: Project) -> None:
    make_grey(project, 4095)
    make_grey(project, 40000, folder="dog")
    assert "16-bit grey" not in said(project)


def test_values_above_grey_max_are_counted(project: Project) -> None:
    make_grey(project, 4096)
    project.set("data.grey_max", 4095)
    assert "1 image with values above data.grey_max, which become white" in said(project)


def test_shapes_and_what_a_crop_would_discard_are_measured(project: Project) -> None:
    for path in project.path("images").rglob("*.png"):
        with Image.open(path) as image:
            wide = image.resize((80, 40) if path.parent.name == "cat" else (40, 40))
        wide.save(path)
    assert project.run("split") == 0
    shapes = {"aspect_low": 1.0, "aspect_median": 1.5, "aspect_high": 2.0, "crop_discards": 0.25}
    assert project.split_report()["shapes"] == shapes


def bars() -> Image.Image:
    """80 x 40 pixels, white but for a black bar at either end."""
    image = Image.new("RGB", (80, 40), "white")
    image.paste("black", (0, 0, 8, 40))
    image.paste("black", (72, 0, 80, 40))
    return image


TORCHVISIONS = Preprocessing(resize=64, crop=56, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("framing", "size", "resize", "crop"),
    [
        *((None, None, 64, 56), (None, 32, None, 32), ("crop", None, 64, 56), ("crop", 28, 32, 28)),
        *(("squash", None, None, 56), ("squash", 32, None, 32), ("pad", None, None, 56), ("pad", 32, None, 32)),
    ],
)
def test_each_framing_has_the_size_that_is_asked_for(
    framing: str | None, size: int | None, resize: int | None, crop: int
) -> None:
    framed = TORCHVISIONS.framed(size, framing)  # type: ignore[arg-type]
    assert (framed.resize, framed.crop, framed.pad) == (resize, crop, framing == "pad")
    assert make_transform(framed, "none")(bars()).shape == (3, crop, crop)


def test_crop_takes_the_middle_squash_and_pad_the_whole() -> None:
    crop, squash, pad = (
        make_transform(TORCHVISIONS.framed(32, framing), "none")(bars()) for framing in ("crop", "squash", "pad")
    )
    assert crop.min() > 0.99  # the bars at both ends are gone
    assert (squash[:, :, 0] < -0.99).all()
    assert (squash[:, :, -1] < -0.99).all()
    assert (pad[:, 8:24, 0] < -0.9).all()
    assert (pad[:, :8].abs() < 0.01).all()  # margins: the mean colour, which is 0 to the network
    assert (pad[:, 24:].abs() < 0.01).all()
    assert torch.equal(make_transform(TORCHVISIONS.framed(32, None), "none")(bars()), squash)


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_padded_images_are_augmented_inside_their_margins(augment: str) -> None:
    torch.manual_seed(0)
    transform = make_transform(TORCHVISIONS.framed(32, "pad"), augment)  # type: ignore[arg-type]
    with_margins = [(transform(bars())[:, :2].abs() < 0.01).all() for _ in range(20)]
    assert any(with_margins)


def test_options_that_are_off_are_not_written_and_options_that_are_on_read_back() -> None:
    assert set(TORCHVISIONS.to_json()) == {"resize", "crop", "mean", "std", "interpolation"}
    framed = TORCHVISIONS.framed(32, "pad", grey_max=4095)
    assert Preprocessing.from_json(framed.to_json()) == framed
