"""A picture file -> an upright RGB picture."""

import io
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_BYTES = 2**29
# Pillow warns of a decompression bomb above this and fails only at twice the size; here it is the limit.
MAX_PIXELS = 89_478_485
# Resizing the shorter side of a thinner strip than this to the network's input would blow up the longer one.
MAX_ASPECT = 100


class PictureError(Exception):
    """A picture that cannot be used. The message says why, in a few words and without naming the file."""


def read_picture(path: Path) -> bytes:
    """Read a picture file.

    Raises:
        OSError: as the file system says.
        PictureError: not a regular file (reading a pipe would wait for ever), or above `MAX_BYTES`.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise PictureError("not a regular file")
    if status.st_size > MAX_BYTES:
        raise PictureError(f"larger than {MAX_BYTES} bytes")
    return path.read_bytes()


def decode(content: bytes) -> Image.Image:
    """Decode completely the first frame of a picture, upright as its EXIF orientation says, as 8-bit RGB.

    Transparency is laid over white, 16-bit grey is scaled to 8 bits (Pillow's own conversion clips it), CMYK and
    palettes are converted.

    Raises:
        PictureError: `content` is empty, truncated, not a picture, above `MAX_PIXELS`, thinner than 1:`MAX_ASPECT`, or
            of a kind that has no stated range (32-bit float).
    """
    if not content:
        raise PictureError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that does not matter here, and bombs, which are refused below
            with Image.open(io.BytesIO(content)) as picture:
                _check_size(*picture.size)
                picture.load()
                return _to_rgb(ImageOps.exif_transpose(picture))
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError("not a picture in a known format") from None
    except Image.DecompressionBombError:
        raise PictureError(f"more than {MAX_PIXELS} pixels") from None
    # Decoders fed damaged files raise nearly anything: OSError, SyntaxError, ValueError, struct.error, zlib.error ...
    except Exception as error:
        raise PictureError(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PictureError(f"more than {MAX_PIXELS} pixels ({width} x {height})")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise PictureError(f"thinner than 1:{MAX_ASPECT} ({width} x {height})")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise PictureError("32-bit float, whose range is not stated; save it as 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise PictureError("more than 16 bits a value; save it as 8 or 16 bits")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")
