"""Pixels of any mode -> 8-bit sRGB."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

GREY_RANGE = 0xFFFF  # of 16-bit grey
# Profiles that call themselves sRGB differ by rounding; what moves no colour further than this is taken for it.
_SAME = 3


class RangeError(Exception):
    """Values without a stated range, or with one too large. The message says so in a few words."""


def to_rgb(picture: Image.Image, grey_max: int | None = None) -> Image.Image:
    """Return a picture as 8-bit sRGB.

    A colour profile is applied, except to 16-bit grey; one that cannot be read or is for another mode is ignored.

    Args:
        picture: decoded.
        grey_max: the value of 16-bit grey that is white; `None`: 65535.

    Raises:
        RangeError: 32-bit float, or integers that need more than 16 bits.
    """
    if picture.mode == "F":
        raise RangeError("32-bit float, whose range is not stated; save it as 8 or 16 bits")
    if _has_deep_grey(picture):
        values, top = np.asarray(picture).astype(np.int64), grey_max or GREY_RANGE
        if values.min() < 0 or values.max() > GREY_RANGE:
            raise RangeError("more than 16 bits a value; save it as 8 or 16 bits")
        return Image.fromarray((np.minimum(values, top) * 255 // top).astype(np.uint8)).convert("RGB")
    if picture.mode == "LAB":
        return ImageCms.applyTransform(picture, _transform_from_lab()) or picture.convert("RGB")
    profile = picture.info.get("icc_profile")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        if profile:
            colours = _convert(
                picture.convert("LA").convert("L") if picture.mode == "LA" else layer.convert("RGB"), profile
            )
            layer = Image.merge("RGBA", (*colours.split(), layer.getchannel("A")))
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if profile:
        return _convert(picture if picture.mode in ("L", "CMYK") else picture.convert("RGB"), profile)
    return picture.convert("RGB")


def highest_grey(picture: Image.Image) -> int | None:
    """Return the highest value of 16-bit grey, `None` for any other picture."""
    return int(np.asarray(picture).max()) if _has_deep_grey(picture) else None


def _has_deep_grey(picture: Image.Image) -> bool:
    return picture.mode == "I" or picture.mode.startswith("I;16")


def _convert(picture: Image.Image, profile: bytes) -> Image.Image:
    """Return an L, RGB or CMYK picture with a profile as sRGB."""
    transform = _transform_to_srgb(profile, picture.mode)
    converted = ImageCms.applyTransform(picture, transform) if transform else None
    return converted or picture.convert("RGB")


@lru_cache(maxsize=1)
def _transform_from_lab() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")


@lru_cache(maxsize=64)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB, `None` where it would do nothing or the profile cannot be used."""
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, 9 if mode == "RGB" else 256).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(*[steps] * len(mode), indexing="ij"), axis=-1).reshape(-1, 1, len(mode))
    colours = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
    converted = ImageCms.applyTransform(colours, transform)
    if converted is None:
        return None
    moved = np.abs(np.asarray(converted).astype(int) - np.asarray(colours.convert("RGB")).astype(int)).max()
    return transform if moved > _SAME else None
