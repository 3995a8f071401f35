"""Pixels of any mode -> 8-bit sRGB."""

import io
import re
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

GREY_RANGE = 0xFFFF  # of 16-bit grey
# TIFF tags
_BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339
_WHITE_IS_ZERO, _SIGNED, _SEPARATE = 0, 2, 2
# Approximately sRGB's exponent; a PNG with about this one is unchanged.
_GAMMA, _SAME_GAMMA = 1 / 2.2, 0.05
# sRGB profiles differ by rounding: one that moves no colour further than this counts as sRGB.
_SAME = 3


class ImageError(Exception):
    """An image that cannot be used. The message says why, in a few words and without naming the file."""


def to_rgb(image: Image.Image, grey_max: int | None = None) -> Image.Image:
    """Return an image as 8-bit sRGB.

    A colour profile is applied, except to 16-bit grey; one that cannot be read or is for another mode is ignored. The
    gamma of a PNG is applied where it has no profile and does not say that it is sRGB.

    `grey_max`: the value of 16-bit grey that is white; `None`: 65535, or what the bits of a TIFF hold.

    Raises:
        ImageError: 32-bit float, or integers that need more than 16 bits.
    """
    exponent = _exponent(image)
    if image.mode == "F":
        raise ImageError("32-bit float, whose range is not stated; save it as 8 or 16 bits")
    if _has_deep_grey(image):
        values, top = np.asarray(image).astype(np.int64), grey_max or min(GREY_RANGE, 2 ** _bits(image)[0] - 1)
        if values.min() < 0 or values.max() > GREY_RANGE:
            raise ImageError("more than 16 bits a value; save it as 8 or 16 bits")
        shown = np.minimum(values, top)
        if _tags(image).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            shown = top - shown
        shown = shown * 255 // top if exponent == 1 else np.rint((shown / top) ** exponent * 255)
        shown[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(shown.astype(np.uint8)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if exponent != 1:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        bent = [round(255 * (value / 255) ** exponent) for value in range(256)]
        image = image.point(bent * 3 + list(range(256)) * (len(image.getbands()) - 3))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image.convert("RGB")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if profile:
            opaque = image.convert("L") if image.mode == "LA" else layer.convert("RGB")
            layer = Image.merge("RGBA", (*_convert(opaque, profile).split(), layer.getchannel("A")))
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if profile:
        return _convert(image if image.mode in ("L", "CMYK") else image.convert("RGB"), profile)
    return image.convert("RGB")


def require_stated_values(image: Image.Image) -> None:
    """Refuse a TIFF, not yet loaded, with signed values or 16-bit planes, which Pillow misreads."""
    bits = _bits(image)
    if _SIGNED in _tags(image).get(_SAMPLE_FORMAT, ()) and max(bits) <= 16:
        raise ImageError("values with a sign, whose range is not stated; save it as 8 or 16 bits without")
    if len(bits) > 1 and (max(bits) > 8 or len(bits) == 2) and _tags(image).get(_PLANAR) == _SEPARATE:
        raise ImageError("bands in separate planes, which cannot be read; save them together")


def fit_transparent_colour(image: Image.Image) -> None:
    """Scale the transparent colour of a PNG, not yet loaded, to the 8 bits to which Pillow converts pixels."""
    key, raw = image.info.get("transparency"), str(getattr(image, "tile", ""))
    if isinstance(key, int) and (match := re.search(r"'L;([24])'", raw)):
        image.info["transparency"] = key * 255 // (2 ** int(match[1]) - 1)
    elif isinstance(key, tuple) and ";16" in raw:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def find_dim_colours(image: Image.Image) -> tuple[str, ...]:
    """Return the remark `dim` if 16-bit colours use at most 14 bits; raise ImageError for 12, nearly black.

    Pillow keeps the upper 8.
    """
    highest = np.asarray(image.convert("RGB")).max()
    if 0 < highest < 16:
        raise ImageError("at most 12 of 16 bits a colour used; save it as 8 bits, or with values up to 65,535")
    return ("dim",) if 0 < highest < 64 else ()


def without_false_alpha(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Return an image without an alpha channel that is no transparency, and the remark `clear` (everywhere) or `band`.

    Near-infrared bands of aerial TIFFs are stored as alpha. They have the texture of an image and hardly any extreme
    values, while transparency has hardly any other.
    """
    if image.mode not in ("LA", "La", "RGBA"):
        return image, ()
    layer = image.convert("LA" if image.mode in ("LA", "La") else "RGBA")
    alpha = layer.getchannel("A")
    if alpha.getextrema()[1] == 0:
        why = "clear"
    elif image.format == "TIFF" and _is_band(alpha):
        why = "band"
    else:
        return image, ()
    return layer.convert("RGB"), (why,)


def _is_band(alpha: Image.Image) -> bool:
    values = np.asarray(alpha).astype(np.int16)
    steps = np.diff(values, axis=1)
    turns = steps[:, 1:] * steps[:, :-1] < 0
    return bool(np.isin(values, (0, 255)).mean() < 0.05 and turns.sum() > 0.2 * turns.size > 0)


def highest_grey(image: Image.Image) -> int | None:
    """Return the highest value of 16-bit grey, `None` for any other image."""
    return int(np.asarray(image).max()) if _has_deep_grey(image) and _bits(image)[0] > 12 else None


def _tags(image: Image.Image) -> dict[int, Any]:
    return getattr(image, "tag_v2", {})


def _bits(image: Image.Image) -> tuple[int, ...]:
    """Return the bits of each value of a TIFF, 16 for any other image."""
    return tuple(_tags(image).get(_BITS, (16,)))


def _exponent(image: Image.Image) -> float:
    """Return the exponent that converts the values of a PNG to sRGB, 1 for any other image."""
    gamma = image.info.get("gamma")
    if not gamma or "icc_profile" in image.info or "srgb" in image.info or not 0.1 < gamma < 10:
        return 1
    return 1 if abs(_GAMMA / gamma - 1) < _SAME_GAMMA else _GAMMA / gamma


def _has_deep_grey(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def _convert(image: Image.Image, profile: bytes) -> Image.Image:
    """Return an L, RGB or CMYK image with a profile as sRGB."""
    transform = _transform_to_srgb(profile, image.mode)
    return (transform and ImageCms.applyTransform(image, transform)) or image.convert("RGB")


@lru_cache(maxsize=64)
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB, `None` if it would do nothing or the profile is unusable."""
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
