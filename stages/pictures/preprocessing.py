"""What a picture goes through on its way into the network: preprocessing, and augmentation in training."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torchvision.transforms import InterpolationMode, v2

from stages.common.params import Augment

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What a picture goes through on its way into the network.

    The shorter side is resized to `resize` pixels and the middle `crop` x `crop` is kept; where `resize` is `None`, the
    whole picture is resized to `crop` x `crop`, so that nothing is cut off. Values go to [0, 1] and are normalized by
    `mean` and `std`, one a channel.
    """

    resize: int | None = None
    crop: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocessing":
        """Make one from a JSON object of its fields; those not named keep their defaults.

        Raises:
            TypeError: not such an object.
        """
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in dict(values).items()
        }
        return cls(**fields)

    def with_image_size(self, image_size: int | None) -> "Preprocessing":
        """Return the same for whole pictures at `image_size` x `image_size`; unchanged for `None`."""
        return self if image_size is None else replace(self, resize=None, crop=image_size)


def make_transform(preprocessing: Preprocessing, augment: Augment) -> v2.Compose:
    """Return the transform from an RGB picture to a float32 tensor of shape (3, crop, crop).

    `light` moves the crop a little and mirrors half of the pictures; `strong` takes crops from 35% of the area up,
    mirrors half, and adds TrivialAugment (https://arxiv.org/abs/2103.10158) and random erasing.
    """
    crop, interpolation = preprocessing.crop, InterpolationMode(preprocessing.interpolation)
    framing: list[torch.nn.Module]
    erasing: list[torch.nn.Module] = []
    if augment == "none":
        framing = [v2.Resize(preprocessing.resize or (crop, crop), interpolation), v2.CenterCrop(crop)]
    elif augment == "light":
        framing = [
            v2.RandomResizedCrop(crop, (0.8, 1.0), (0.9, 1.1), interpolation),
            v2.RandomHorizontalFlip(),
        ]
    else:
        framing = [
            v2.RandomResizedCrop(crop, (0.35, 1.0), interpolation=interpolation),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(interpolation=interpolation),
        ]
        erasing = [v2.RandomErasing(p=0.25)]
    normalize = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(preprocessing.mean, preprocessing.std),
    ]
    return v2.Compose([*framing, *normalize, *erasing])
