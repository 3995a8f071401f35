"""Images of every kind become upright 8-bit RGB; what cannot be used says why."""

import struct
import zlib
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from making import chunk, encode, noise, turned
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, UnidentifiedImageError

from stages.images import decode as decoding
from stages.images.collection import EXTENSIONS
from stages.images.decode import ImageError, decode

RED = (200, 30, 40)


def colour(content: bytes, at: tuple[int, int] = (4, 4)) -> tuple[int, ...]:
    image = decode(content)
    assert image.mode == "RGB"
    value = image.getpixel(at)
    assert isinstance(value, tuple)
    return value


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 255, 0, *RED])
    image.paste(1, (8, 0, 16, 16))
    content = encode(image, "PNG", transparency=0)
    assert colour(content) == (255, 255, 255)
    assert colour(content, (12, 4)) == RED


def test_of_an_animation_the_first_frame_is_used() -> None:
    frames = [Image.new("RGB", (16, 16), value) for value in (RED, (0, 0, 255))]
    for kind in ("PNG", "WEBP", "TIFF", "GIF", "AVIF"):
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert colour(content) == pytest.approx(RED, abs=8)


def test_an_image_just_above_the_pixel_limit_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 99)
    decode(encode(Image.new("RGB", (9, 11)), "PNG"))
    content = encode(Image.new("RGB", (10, 10)), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="more than 99 pixels"):
        decode(content)


def png_with(*chunks: bytes) -> bytes:
    plain = encode(noise(), "PNG")
    return plain[:33] + b"".join(chunks) + plain[33:]


def long_text(add: str, size: int, compressed: bool) -> bytes:
    info = PngImagePlugin.PngInfo()
    getattr(info, add)("Comment", "x" * size, zip=compressed)
    return encode(noise(), "PNG", pnginfo=info)


ODD_PNGS = {
    "long compressed text": long_text("add_text", 2_000_000, True),
    "very long text": long_text("add_text", 70_000_000, False),
    "long international text": long_text("add_itxt", 2_000_000, True),
    "long profile": encode(noise(), "PNG", icc_profile=bytes(2_000_000)),
    "profile of zeros without end": encode(noise(), "PNG", icc_profile=bytes(40_000_000)),
    "checksum of a text": png_with(chunk(b"tEXt", b"k\0v", damage=1)),
    "checksum of a time": png_with(chunk(b"tIME", bytes(7), damage=1)),
    "profile that is none": png_with(chunk(b"iCCP", b"x")),
    "short density": png_with(chunk(b"pHYs", b"\0")),
    "short gamma": png_with(chunk(b"gAMA", b"")),
    "short animation": png_with(chunk(b"acTL", b"\0")),
    "EXIF that is none": png_with(chunk(b"eXIf", b"nothing")),
    "EXIF as text that is none": png_with(
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  10\nzz"))
    ),
}


@pytest.mark.parametrize("name", ODD_PNGS)
def test_a_png_with_odd_metadata_has_its_pixels(name: str) -> None:
    assert decode(ODD_PNGS[name]).tobytes() == noise().tobytes()


def test_odd_metadata_keeps_transparency() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 255, 0, *RED])
    whole = encode(image, "PNG", transparency=0)
    assert colour(whole[:33] + chunk(b"tEXt", b"k\0v", damage=1) + whole[33:]) == (255, 255, 255)


def test_damaged_pixels_are_damaged_whatever_the_metadata() -> None:
    whole = long_text("add_text", 2_000_000, True)
    with pytest.raises(ImageError, match=r"^damaged: "):
        decode(whole[: len(whole) - 500])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # where Pillow writes it
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    "options",
    [
        {"exif": b"Exif\0\0no TIFF at all"},
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x0b\0\0\0\x01\x7f\xc0\0\0\0\0\0\0"},  # turned by NaN
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x01\0\0\x87\x69\0\x0d" + b"\xff" * 6},
        {"xmp": b"<x:xmpmeta \xff" + bytes(50_000)},
        {"icc_profile": b"no profile at all"},
        {"icc_profile": bytes(2_000_000)},
    ],
)
def test_unreadable_metadata_does_not_reject_an_image(kind: str, options: dict[str, bytes]) -> None:
    try:
        odd = encode(noise(), kind, **options)
    except (SyntaxError, struct.error):
        pytest.skip("Pillow does not write this")
    assert decode(odd).tobytes() == decode(encode(noise(), kind)).tobytes()


@pytest.mark.parametrize(
    ("marker", "data"),
    [
        (0xE0, b"JFIF\0"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xEE, b"Adobe\0"),
        (0xE2, b"MPF\0"),
        (0xED, b"Photoshop 3.0\0" + b"8BIM"),
    ],
)
def test_a_jpeg_with_a_segment_cut_short_has_its_pixels_and_is_upright(marker: int, data: bytes) -> None:
    whole = encode(noise(), exif=turned(6))
    odd = whole[:2] + b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data + whole[2:]
    assert decode(odd).size == (24, 32)
    assert decode(odd).tobytes() == decode(whole).tobytes()


def test_a_jpeg_with_a_small_version_in_its_exif_and_an_odd_segment_has_its_pixels() -> None:
    plain = encode(noise())
    segments = [b"Exif\0\0no TIFF" + encode(noise()), b"JFIF\0"]
    odd = b"".join(
        b"\xff" + bytes([0xE1 - number]) + struct.pack(">H", len(data) + 2) + data
        for number, data in enumerate(segments)
    )
    assert decode(plain[:2] + odd + plain[2:]).tobytes() == decode(plain).tobytes()


def test_a_jpeg_cut_short_anywhere_is_damaged_with_the_same_reason_in_each_run() -> None:
    whole = encode(noise())
    for size in range(2, len(whole) - 200, 7):
        with pytest.raises(ImageError) as caught:
            decode(whole[:size])
        assert "0x" not in str(caught.value)


def test_lab_is_converted_to_the_same_colours() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.new("RGB", (16, 16), RED), srgb, lab, outputMode="LAB")
    assert image is not None
    assert colour(encode(image, "TIFF")) == pytest.approx(RED, abs=3)


def test_a_turned_image_with_odd_tags_is_upright() -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x88\x25\0\x05\0\0\0\x03\0\0\0\x09\0\0\0\0"
    assert decode(encode(noise(), exif=exif)).size == (24, 32)


@pytest.mark.parametrize(
    ("extension", "kind"),
    [
        *((".jpe", "JPEG"), (".jfif", "JPEG"), (".jp2", "JPEG2000"), (".gif", "GIF"), (".avif", "AVIF")),
        *((".apng", "PNG"), (".dib", "DIB"), (".tga", "TGA"), (".pnm", "PPM"), (".pbm", "PPM")),
    ],
)
def test_each_extension_that_counts_as_an_image_can_be_decoded(extension: str, kind: str) -> None:
    assert extension in EXTENSIONS
    assert colour(encode(Image.new("RGB", (16, 16), RED), kind)) == pytest.approx(RED, abs=8)


def test_heic_without_its_package_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_HEIF", False)
    content = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(100)
    monkeypatch.setattr(Image, "open", Mock(side_effect=UnidentifiedImageError))
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        decode(content)


def wide_profile() -> bytes:
    """A matrix profile with Adobe RGB's primaries (D50) and a gamma of 2.2, from the ICC's specification."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(65536 * value) for value in values))

    colorants = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
        b"wtpt": (0.9642, 1.0, 0.8249),
    }
    tags = {name: b"XYZ \0\0\0\0" + fixed(*values) for name, values in colorants.items()}
    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma)
    tags |= {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
    }
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        padded = data + bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += padded
    header = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249) + bytes(48)
    return header + table + body


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("TIFF", {}), ("JPEG", {"quality": 98}), ("WEBP", {"lossless": True})]
)
def test_colours_of_another_profile_are_converted(kind: str, options: dict[str, Any]) -> None:
    # Worked out from the matrices and the gammas of Adobe RGB (1998) and of sRGB: 136.97, 181.47, 117.24.
    content = encode(Image.new("RGB", (16, 16), (150, 180, 120)), kind, icc_profile=wide_profile(), **options)
    assert colour(content) == pytest.approx((137, 181, 117), abs=5)


def test_transparency_survives_a_profile() -> None:
    image = Image.new("RGBA", (16, 16), (150, 180, 120, 0))
    image.paste((150, 180, 120, 255), (8, 0, 16, 16))
    content = encode(image, "PNG", icc_profile=wide_profile())
    assert colour(content) == (255, 255, 255)
    assert colour(content, (12, 4)) == pytest.approx((137, 181, 117), abs=2)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_a_profile_of_srgb_or_of_another_mode_changes_nothing(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "LA") else "PNG"
    image = noise().convert("L").convert(mode) if mode == "LA" else noise().convert(mode)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = decode(encode(image, kind))
    assert decode(encode(image, kind, icc_profile=srgb)).tobytes() == plain.tobytes()


def test_12_bit_grey_is_scaled_by_the_white_level() -> None:
    content = encode(Image.fromarray(np.full((16, 16), 2000, np.uint16)), "PNG")
    assert colour(content) == (7, 7, 7)
    assert decode(content, grey_max=4095).getpixel((0, 0)) == (124, 124, 124)
    assert decode(content, grey_max=1000).getpixel((0, 0)) == (255, 255, 255)
