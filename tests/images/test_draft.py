"""JPEGs decoded at a fraction of their size: as good for the network, and as strict about damage."""

import numpy as np
import pytest
import torch
from making import encode, turned
from PIL import Image, ImageFilter

from stages.images.decode import decode, decode_with_facts
from stages.images.preprocessing import Preprocessing, make_transform


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something like a photo: shapes with edges, shading, and noise of a sensor."""
    noise = np.random.default_rng(seed)
    coarse = Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    shapes = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    shapes[shapes > 140] += 50
    grain = noise.normal(0, 6, (height, width, 3))
    image = Image.fromarray(np.clip(shapes + grain, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(1))


@pytest.mark.parametrize(
    ("size", "least"), [((2000, 1500), 448), ((1500, 2000), 300), ((900, 900), 448), ((95, 70), 9)]
)
def test_a_reduced_jpeg_keeps_the_asked_for_size_on_both_sides(size: tuple[int, int], least: int) -> None:
    content = encode(scene(*size))
    decoded = decode_with_facts(content, least=least)
    assert min(decoded.image.size) >= least
    assert decoded.size == size
    assert max(decoded.image.size) < max(size)
    assert decode(content).size == size
    assert decode(content, least=max(size)).size == size


def test_a_turned_image_has_its_upright_size() -> None:
    decoded = decode_with_facts(encode(scene(400, 300), exif=turned(6)), least=20)
    assert decoded.size == (300, 400)
    assert decoded.image.size == (38, 50)


@pytest.mark.parametrize("framing", ["squash", "crop", "pad"])
def test_decoding_smaller_changes_an_image_less_than_saving_it_again(framing: str) -> None:
    preprocessing = Preprocessing().framed(64, framing)  # type: ignore[arg-type]
    transform, least = make_transform(preprocessing, "none"), preprocessing.least("none")
    for seed in range(2):
        content = encode(scene(800, 600, seed), quality=92)
        full, drafted = decode(content), decode(content, least=least)
        assert drafted.size < full.size
        small = make_transform(preprocessing, "none")(full)
        # As a copy at the size that the network sees would be saved.
        shown = Image.fromarray(pixels(small, preprocessing))
        again = transform(decode(encode(shown, quality=95)))
        assert (transform(drafted) - small).abs().mean() < (again - small).abs().mean()


def pixels(image: torch.Tensor, preprocessing: Preprocessing) -> np.ndarray:
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    shown: np.ndarray = (255 * (image * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return shown


def test_decoding_smaller_is_part_of_the_preprocessing_and_off_in_older_checkpoints() -> None:
    now = Preprocessing().framed(64, None)
    assert now.to_json()["draft"] is True
    assert (now.least("none"), now.least("light")) == (128, 256)
    earlier = {name: value for name, value in now.to_json().items() if name != "draft"}
    assert Preprocessing.from_json(earlier).least("none") is None
