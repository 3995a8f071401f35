"""An image file -> an upright RGB image."""

import io
import re
import stat
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import simplejpeg
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from stages.images.colour import ImageError as ImageError
from stages.images.colour import (
    find_dim_colours,
    fit_transparent_colour,
    highest_grey,
    require_stated_values,
    to_rgb,
    without_false_alpha,
)

_HEIF = find_spec("pillow_heif") is not None

MAX_BYTES = 2**29
# Pillow warns of a decompression bomb above this and fails at twice the size; here it is the limit.
MAX_PIXELS = 89_478_485
# Times MAX_PIXELS, for JPEGs decoded at a fraction of their size, which needs little memory: phones take 200 MP.
_SHRUNK = 3
Image.MAX_IMAGE_PIXELS = _SHRUNK * MAX_PIXELS
# In a thinner strip than this, resizing the shorter side would make the longer one huge.
MAX_ASPECT = 100
# Pillow calls a PNG damaged if its colour profile or text is longer than this, by default 2^20 bytes.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_BYTES
NEEDS_HEIF = "HEIC, which needs `pip install pillow-heif`"

# Beside HEIF and TGA, the only formats that are opened: Pillow would pass PostScript to Ghostscript.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")
_TIFF_SIGNS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG\r\n\x1a\n"
_ADOBE = rb"\xff\xee..Adobe.{7}"  # the colour encoding of a JPEG
# Beginnings of libjpeg's warnings of damage.
_DAMAGE = ("Corrupt JPEG data", "Premature end", "Inconsistent progression")
_PAGED = ("TIFF", "GIF", "WEBP", "PNG", "AVIF")

# Signatures of known formats, readable or not.
_SIGNS = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF.{4}WEBP|.{4}ftypavi[fs]|\0\0\0\x0cjP  ", re.DOTALL)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ORIENTATION, _MAKE, _MODEL = 0x0112, 0x010F, 0x0110  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: Path) -> bytes:
    """Read an image file; raises ImageError above `MAX_BYTES`, and for a pipe, which would block."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not a regular file")
    if status.st_size > MAX_BYTES:
        raise ImageError(f"larger than {MAX_BYTES} bytes")
    return path.read_bytes()


@dataclass(frozen=True)
class Decoded:
    """An image; its upright `size` in the file; the highest value of 16-bit grey, `None` for other images.

    `storage`: the file's format and mode, and the camera by EXIF. `remarks`: `pages` after the first are left out; the
    transparency is none, since it is `clear` everywhere, or a `band` of its own; 16 bits a colour are `dim`.
    """

    image: Image.Image
    size: tuple[int, int]
    highest_grey: int | None
    storage: tuple[str, str, str]
    remarks: tuple[str, ...] = ()


def decode(content: bytes, grey_max: int | None = None, least: int | None = None) -> Image.Image:
    """Decode completely the first frame of an image, upright as its EXIF orientation says, as 8-bit sRGB.

    Metadata that cannot be read makes no image bad. An ImageError says why an image is.

    Args:
        content: of the file.
        grey_max: the value of 16-bit grey that is white; `None`: 65535. Pillow's own conversion clips such values.
        least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as both sides keep so many
            pixels; `None`: at its full size.
    """
    return decode_with_facts(content, grey_max, least, whole=False).image


def decode_with_facts(
    content: bytes, grey_max: int | None = None, least: int | None = None, whole: bool = True
) -> Decoded:
    """Decode an image as `decode` does, with facts about the file; `whole`: raise ImageError for gaps in it."""
    if not content:
        raise ImageError("empty file")
    try:
        return _decode(content, grey_max, least, whole)
    except ImageError as error:
        # Damage may be confined to a profile, a checksum or other metadata.
        for spared in _without_metadata(content):
            with suppress(ImageError):
                return _decode(spared, grey_max, least, whole)
        raise error from None


def _without_metadata(content: bytes) -> Iterator[bytes]:
    """Yield a PNG or JPEG without damaged metadata, then without metadata that does not affect pixels."""
    if content.startswith(_PNG):
        for is_spared in (_is_sound, lambda chunk: chunk[4:8] == b"tRNS"):
            yield _PNG + b"".join(chunk for chunk in _cut(content) if chunk[4:5].isupper() or is_spared(chunk))
    elif content.startswith(b"\xff\xd8"):
        for spared in ((rb"\xff\xe1..Exif\0\0", _ADOBE), (_ADOBE,)):
            needed = re.compile(b"|".join((rb"[^\xff]|\xff[^\xe0-\xef\xfe]", *spared)), re.DOTALL)
            yield content[:2] + b"".join(filter(needed.match, _cut(content)))


def _cut(content: bytes) -> Iterator[bytes]:
    """Yield the chunks of a PNG, or the segments of a JPEG: the last one from its first scan on."""
    png = content.startswith(_PNG)
    start = 8 if png else 2
    while start < len(content):
        head, end = content[start : start + 4], len(content)
        if png:
            end = start + 12 + int.from_bytes(head, "big")
        elif head[:1] == b"\xff" and head[1:2] != b"\xda":
            end = start + 2 + int.from_bytes(head[2:], "big")
        yield content[start:end]
        start = end


def _is_sound(chunk: bytes) -> bool:
    return chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4, "big")


def _decode(content: bytes, grey_max: int | None, least: int | None, whole: bool) -> Decoded:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unimportant metadata, and of bombs, which are refused below
            heif = _HEIF and content[4:8] == b"ftyp"
            if heif:
                from pillow_heif import register_heif_opener  # here, since its library takes long to load

                register_heif_opener()
            # TGA comes last: it has no signature.
            with Image.open(io.BytesIO(content), formats=(*_FORMATS, *["HEIF"] * heif, "TGA")) as image:
                return _load(image, content, grey_max, least, whole)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS and not _HEIF:
            raise ImageError(NEEDS_HEIF) from None
        if content[:4] in _TIFF_SIGNS:
            raise ImageError("TIFF of bits, bands or compression that are not read; save it as 8 bits") from None
        if _SIGNS.match(content):
            raise ImageError("damaged: its beginning cannot be read") from None
        raise ImageError("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS} pixels") from None
    # Decoders fed damaged files raise nearly anything: OSError, SyntaxError, ValueError, struct.error, zlib.error ...
    except Exception as error:
        raise ImageError(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def _load(image: ImageFile.ImageFile, content: bytes, grey_max: int | None, least: int | None, whole: bool) -> Decoded:
    is_jpeg, kind, mode, size = isinstance(image, JpegImageFile), image.format or "", image.mode, image.size
    most = _SHRUNK * MAX_PIXELS if is_jpeg and least is not None else MAX_PIXELS
    if size[0] * size[1] > most:
        raise ImageError(f"more than {most} pixels ({size[0]} x {size[1]})")
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(f"thinner than 1:{MAX_ASPECT} ({size[0]} x {size[1]})")
    require_stated_values(image)
    fit_transparent_colour(image)
    deep = any(";16" in str(tile) for tile in image.tile)  # before the PNG is loaded
    pages = ("pages",) if kind in _PAGED and getattr(image, "is_animated", False) else ()
    orientation, camera = _read_exif(image)
    if is_jpeg and least is not None:
        image.draft(None, (least, least))
    loaded = _load_whole_jpeg(image, content) if is_jpeg and whole else image
    loaded.load()
    if whole and kind == "PNG" and not all(_is_sound(chunk) for chunk in _cut(content) if chunk[4:8] == b"IDAT"):
        raise ImageError("damaged: a checksum of its pixels is wrong")  # Pillow does not check it
    if kind == "TIFF":  # Pillow has turned it
        orientation, size = 1, loaded.size
    highest = highest_grey(loaded)
    dim = find_dim_colours(loaded) if deep and highest is None else ()
    shown, false_alpha = without_false_alpha(loaded)
    upright = to_rgb(shown, grey_max)
    if orientation in _TURNS:  # not ImageOps.exif_transpose, which fails on odd metadata
        upright = upright.transpose(_TURNS[orientation])
    upright_size = size[::-1] if orientation in (5, 6, 7, 8) else size
    return Decoded(upright, upright_size, highest, (kind, mode, camera), (*pages, *dim, *false_alpha))


def _load_whole_jpeg(image: Image.Image, content: bytes) -> Image.Image:
    """Load a JPEG; raise ImageError for damage: libjpeg fills gaps with grey and a warning, which Pillow drops.

    Zeros before the end, by some cameras, and a stray byte there, by some programs, are no damage.
    """
    colours = {"RGB": "RGB", "L": "GRAY"}.get(image.mode)
    try:
        pixels = simplejpeg.decode_jpeg(content, colours or "GRAY", min_height=image.height, min_width=image.width)
    except ValueError as error:
        message = str(error)
        padding = re.search(r"(\d+) extraneous bytes before marker 0xd9", message)
        harmless = padding and (int(padding[1]) < 3 or bytes(int(padding[1])) + b"\xff\xd9" in content)
        if message.startswith(_DAMAGE) and not harmless:
            raise ImageError(f"damaged: {message}") from None
        return image
    if colours is None or pixels.shape[:2] != image.size[::-1]:
        return image
    loaded = Image.fromarray(pixels if colours == "RGB" else pixels[..., 0])
    loaded.info = image.info
    return loaded


def _read_exif(image: Image.Image) -> tuple[int, str]:
    """Return the orientation by EXIF or XMP, 1 (upright) if unreadable, and the camera."""
    try:
        exif = image.getexif()
        return int(exif.get(_ORIENTATION, 1)), f"{exif.get(_MAKE, '')} {exif.get(_MODEL, '')}"
    except Exception:  # Damaged metadata also raises nearly anything.
        return 1, ""
