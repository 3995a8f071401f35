"""Pictures of every kind become upright 8-bit RGB; what cannot be used says why."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from stages.pictures import decode as decoding
from stages.pictures.decode import PictureError, decode

RED = (200, 30, 40)


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def colour(content: bytes, at: tuple[int, int] = (4, 4)) -> tuple[int, ...]:
    picture = decode(content)
    assert picture.mode == "RGB"
    value = picture.getpixel(at)
    assert isinstance(value, tuple)
    return value


def test_cmyk_keeps_its_colour() -> None:
    content = encode(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95)
    assert colour(content) == pytest.approx(RED, abs=6)


def test_transparent_parts_become_white_whatever_colour_hides_there() -> None:
    picture = Image.new("RGBA", (16, 16), (0, 255, 0, 0))
    picture.paste((*RED, 255), (8, 0, 16, 16))
    assert colour(encode(picture, "PNG")) == (255, 255, 255)
    assert colour(encode(picture, "PNG"), (12, 4)) == RED


def test_a_palette_with_transparency_becomes_white_there() -> None:
    picture = Image.new("P", (16, 16), 0)
    picture.putpalette([0, 255, 0, *RED])
    picture.paste(1, (8, 0, 16, 16))
    content = encode(picture, "PNG", transparency=0)
    assert colour(content) == (255, 255, 255)
    assert colour(content, (12, 4)) == RED


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    content = encode(Image.fromarray(np.full((16, 16), 100 * 257, np.uint16)), kind)
    assert colour(content) == (100, 100, 100)


def test_grey_is_the_same_in_all_channels() -> None:
    assert colour(encode(Image.new("L", (16, 16), 77), "PNG")) == (77, 77, 77)


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (16, 16), value) for value in (RED, (0, 0, 255))]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        assert colour(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)) == RED


def test_exif_orientation_is_honoured() -> None:
    picture = Image.new("RGB", (32, 16), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 16, 16))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise to view
    turned = decode(encode(picture, "JPEG", exif=exif))
    assert turned.size == (16, 32)
    assert turned.getpixel((8, 2))[0] > 250 > 5 > turned.getpixel((8, 29))[0]


def jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), "JPEG")


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"this is no picture", "not a picture in a known format"),
        (jpeg()[: len(jpeg()) // 2], "damaged: .*truncated"),
        (bomb(), "more than 89478485 pixels"),
        (encode(Image.new("RGB", (2001, 20)), "PNG"), r"thinner than 1:100 \(2001 x 20\)"),
        (encode(Image.fromarray(np.ones((16, 16), np.float32)), "TIFF"), "32-bit float"),
        (encode(Image.fromarray(np.full((16, 16), 2**20, np.int32)), "TIFF"), "more than 16 bits"),
    ],
    ids=["empty", "text", "truncated", "bomb", "strip", "float", "32 bit"],
)
def test_what_cannot_be_used_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(PictureError, match=f"^{reason}"):
        decode(content)


def test_a_picture_just_above_the_pixel_limit_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 99)
    decode(encode(Image.new("RGB", (9, 11)), "PNG"))
    content = encode(Image.new("RGB", (10, 10)), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="more than 99 pixels"):
        decode(content)


def test_no_reason_holds_an_address_that_differs_between_runs() -> None:
    whole = jpeg()
    for cut in range(0, len(whole) - 100, 50):
        with pytest.raises(PictureError) as caught:
            decode(whole[:cut])
        assert "0x" not in str(caught.value)
