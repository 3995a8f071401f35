"""Pixels of any mode -> 8-bit sRGB."""

import io
import re
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

GREY_RANGE = 0xFFFF  # of 16-bit grey
# TIFF tags
_BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339
_WHITE_IS_ZERO, _SIGNED, _SEPARATE = 0, 2, 2
# The exponent of sRGB, near enough; a PNG that states about this one is shown as it is.
_GAMMA, _SAME_GAMMA = 1 / 2.2, 0.05
# Profiles that call themselves sRGB differ by rounding; what moves no colour further than this is taken for it.
_SAME = 3


class RangeError(Exception):
    """Values without a stated range, or with one too large. The message says so in a few words."""


def to_rgb(picture: Image.Image, grey_max: int | None = None) -> Image.Image:
    """Return a picture as 8-bit sRGB.

    A colour profile is applied, except to 16-bit grey; one that cannot be read or is for another mode is ignored. The
    gamma of a PNG is applied where it has no profile and does not say that it is sRGB.

    Args:
        picture: decoded.
        grey_max: the value of 16-bit grey that is white; `None`: 65535, or what the bits of a TIFF hold.

    Raises:
        RangeError: 32-bit float, or integers that need more than 16 bits.
    """
    exponent = _exponent(picture)
    if picture.mode == "F":
        raise RangeError("32-bit float, whose range is not stated; save it as 8 or 16 bits")
    if _has_deep_grey(picture):
        values, top = np.asarray(picture).astype(np.int64), grey_max or min(GREY_RANGE, 2 ** _bits(picture)[0] - 1)
        if values.min() < 0 or values.max() > GREY_RANGE:
            raise RangeError("more than 16 bits a value; save it as 8 or 16 bits")
        shown = np.minimum(values, top)
        if _tags(picture).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            shown = top - shown
        shown = shown * 255 // top if exponent == 1 else np.rint((shown / top) ** exponent * 255)
        shown[values == picture.info.get("transparency", -1)] = 255
        return Image.fromarray(shown.astype(np.uint8)).convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    if exponent != 1:
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        bent = [round(255 * (value / 255) ** exponent) for value in range(256)]
        picture = picture.point(bent * 3 + list(range(256)) * (len(picture.getbands()) - 3))
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


def require_stated_values(picture: Image.Image) -> None:
    """Refuse a picture, not yet loaded, whose values Pillow would take for others.

    Raises:
        RangeError: a TIFF with a sign, or with planes of 16 bits each.
    """
    bits = _bits(picture)
    if _SIGNED in _tags(picture).get(_SAMPLE_FORMAT, ()) and max(bits) <= 16:
        raise RangeError("values with a sign, whose range is not stated; save it as 8 or 16 bits without")
    if len(bits) > 1 and (max(bits) > 8 or len(bits) == 2) and _tags(picture).get(_PLANAR) == _SEPARATE:
        raise RangeError("bands in separate planes, which cannot be read; save them together")


def fit_transparent_colour(picture: Image.Image) -> None:
    """Give the colour that a PNG, not yet loaded, names as transparent in the 8 bits that Pillow makes of others."""
    key, raw = picture.info.get("transparency"), str(getattr(picture, "tile", ""))
    if isinstance(key, int) and (match := re.search(r"'L;([24])'", raw)):
        picture.info["transparency"] = key * 255 // (2 ** int(match[1]) - 1)
    elif isinstance(key, tuple) and ";16" in raw:
        picture.info["transparency"] = tuple(value >> 8 for value in key)


def require_bright_colours(picture: Image.Image) -> None:
    """Refuse a picture of 16 bits a colour of which only the lower ones are used: Pillow keeps the upper 8.

    Raises:
        RangeError: it would be nearly black.
    """
    if 0 < np.asarray(picture.convert("RGB")).max() < 16:
        raise RangeError("at most 12 of 16 bits a colour used; save it as 8 bits, or with values up to 65,535")


def without_false_alpha(picture: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Return a picture without what is stored as transparency and is none, and why: `clear` everywhere, or a `band`.

    Near-infrared bands of aerial TIFFs are stored so. They have the texture of a picture and hardly any value at the
    ends, where transparency is nearly always.
    """
    if picture.mode not in ("LA", "La", "RGBA"):
        return picture, ()
    layer = picture.convert("LA" if picture.mode in ("LA", "La") else "RGBA")
    alpha = layer.getchannel("A")
    if alpha.getextrema()[1] == 0:
        why = "clear"
    elif picture.format == "TIFF" and _is_band(np.asarray(alpha).astype(np.int16)):
        why = "band"
    else:
        return picture, ()
    return layer.convert("RGB"), (why,)


def _is_band(values: npt.NDArray[np.int16]) -> bool:
    steps = np.diff(values, axis=1)
    turns = steps[:, 1:] * steps[:, :-1] < 0
    return bool(np.isin(values, (0, 255)).mean() < 0.05 and turns.sum() > 0.2 * turns.size > 0)


def highest_grey(picture: Image.Image) -> int | None:
    """Return the highest value of 16-bit grey, `None` for any other picture."""
    return int(np.asarray(picture).max()) if _has_deep_grey(picture) and _bits(picture)[0] > 12 else None


def _tags(picture: Image.Image) -> dict[int, Any]:
    return getattr(picture, "tag_v2", {})


def _bits(picture: Image.Image) -> tuple[int, ...]:
    """Return the bits of each value of a TIFF, 16 for any other picture."""
    bits: tuple[int, ...] = _tags(picture).get(_BITS, (16,))
    return bits


def _exponent(picture: Image.Image) -> float:
    """Return the power that takes the values of a PNG to sRGB's, 1 for any other picture."""
    gamma = picture.info.get("gamma")
    if not gamma or "icc_profile" in picture.info or "srgb" in picture.info or not 0.1 < gamma < 10:
        return 1
    return 1 if abs(_GAMMA / gamma - 1) < _SAME_GAMMA else _GAMMA / gamma


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
