"""From a decoded image to the network's input: preprocessing, and augmentation in training."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2

from stages.common.params import Augment, Framing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Enlargement before augmentation crops: 256 to 224, torchvision's border.
_ENLARGED = 8 / 7


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image to the network's input.

    The shorter side is resized to `resize` pixels and the middle `crop` x `crop` is kept; where `resize` is `None`, the
    whole image is resized to `crop` x `crop`, so that nothing is cut off; with `pad`, it keeps its proportions, and
    margins of the mean colour fill the square. Values go to [0, 1] and are normalized by `mean` and `std`, one a
    channel. `grey_max` is the value of 16-bit grey that is white, `None`: 65535. With `draft`, JPEGs that are much
    larger are decoded at a fraction of their size.
    """

    resize: int | None = None
    crop: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    pad: bool = False
    grey_max: int | None = None
    draft: bool = False

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocessing":
        """Read a JSON object of fields; missing ones have their defaults. Raises TypeError if it is no such object."""
        fields: dict[str, Any] = dict(values)
        fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object for `from_json`, without fields that are off."""
        off = ("pad", "grey_max", "draft")
        return {name: value for name, value in asdict(self).items() if name not in off or value}

    def framed(self, image_size: int | None, framing: Framing | None, grey_max: int | None = None) -> "Preprocessing":
        """Return this for another size and another framing.

        `framing`: `crop`: the middle is cut out, after a border as narrow for the size as before; `squash`: the whole
        image, out of proportion; `pad`: the whole image, between margins; `None`: `squash` where `image_size` is given,
        else as before.
        """
        size, resize, pad = image_size or self.crop, self.resize, self.pad
        if framing == "crop":
            resize = round(size * (resize or self.crop) / self.crop)
        elif framing or image_size:
            resize, pad = None, framing == "pad" if framing else pad
        return replace(self, resize=resize, crop=size, pad=pad, grey_max=grey_max, draft=True)

    def least(self, augment: Augment) -> int | None:
        """Return the least number of pixels of a side after decoding; `None`: full size.

        Twice as many as needed, or four times if augmentation enlarges a part.
        """
        return (2 if augment == "none" else 4) * (self.resize or self.crop) if self.draft else None


def make_framing(preprocessing: Preprocessing) -> v2.Compose:
    """Return the first half of the transform: from an RGB image to uint8, (3, crop, crop), not yet normalized."""
    crop, interpolation = preprocessing.crop, InterpolationMode(preprocessing.interpolation)
    method, colour = Image.Resampling[interpolation.name], margin_colour(preprocessing)
    pad = partial(ImageOps.pad, size=(crop, crop), method=method, color=colour)
    resize = v2.Resize(preprocessing.resize or (crop, crop), interpolation)
    return v2.Compose([*[pad] * preprocessing.pad, resize, v2.CenterCrop(crop), v2.ToImage()])


def margin_colour(preprocessing: Preprocessing) -> tuple[int, ...]:
    """Return the colour of the margins of `pad`, 0 to 255."""
    return tuple(round(255 * value) for value in preprocessing.mean)


def make_transform(preprocessing: Preprocessing, augment: Augment) -> v2.Compose:
    """Return the transform from an RGB image to a float32 tensor of shape (3, crop, crop).

    Augmented images are framed as those of the test are, larger by `_ENLARGED`, and cropped at random from there: so
    both show the same parts of an image in the same proportions. `strong` adds TrivialAugment
    (https://arxiv.org/abs/2103.10158).
    """
    crop, interpolation = preprocessing.crop, InterpolationMode(preprocessing.interpolation)
    normalize = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocessing.mean, preprocessing.std)]
    if augment == "none":
        return v2.Compose([make_framing(preprocessing), *normalize])
    resize = preprocessing.resize and round(_ENLARGED * preprocessing.resize)
    framing = make_framing(replace(preprocessing, resize=resize, crop=round(_ENLARGED * crop)))
    if augment == "light":
        return v2.Compose([framing, v2.RandomCrop(crop), v2.RandomHorizontalFlip(), *normalize])
    some = v2.RandomResizedCrop(crop, (0.35, 1.0), interpolation=interpolation)
    changed = [some, v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(interpolation=interpolation)]
    return v2.Compose([framing, *changed, *normalize, v2.RandomErasing(p=0.25)])
