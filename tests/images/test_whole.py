"""Every mode, depth and format comes out as the same image saved plainly, or is refused with its true reason."""

import re
import struct
from collections.abc import Iterator
from typing import Any

import making
import numpy as np
import pytest
from conftest import Project
from making import Refusal, chunk, encode, noise, said, turned
from PIL import Image

from stages.images import decode as decoding
from stages.images.decode import ImageError, decode, decode_with_facts

SIZE = 48
ACROSS = np.tile(np.linspace(0, 1, SIZE), (SIZE, 1))
BANDS = np.stack([ACROSS, ACROSS.T, (ACROSS + ACROSS.T) / 2, 1 - ACROSS], axis=-1)  # 0 to 1
KINDS = {"grey": (1, 1), "la": (2, 1), "rgb": (3, 2), "rgba": (4, 2), "cmyk": (4, 5)}  # bands, TIFF's photometric


def plain(values: np.ndarray, kind: str) -> np.ndarray:
    """What a kind of values, 0 to 1, looks like: RGB, 0 to 255."""
    if kind == "cmyk":
        return (1 - values[..., :3]) * (1 - values[..., 3:]) * 255
    colours = values[..., :3] if kind.startswith("rgb") else np.repeat(values[..., :1], 3, axis=2)
    alpha = values[..., -1:] if kind in ("la", "rgba") else 1
    return (colours * alpha + 1 - alpha) * 255


def pack(values: np.ndarray, bits: int, order: str = "<") -> bytes:
    if bits in (8, 16):
        return values.astype(np.uint8 if bits == 8 else f"{order}u2").tobytes()
    if bits == 32:
        return values.astype(f"{order}f4").tobytes()
    rows = ("".join(f"{value:0{bits}b}" for value in row) for row in values.reshape(len(values), -1).astype(int))
    return b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)


def tiff(values: np.ndarray, photometric: int, bits: int, order: str = "<", **tags: Any) -> bytes:
    """Write an uncompressed TIFF; further tags as `t338=[2]`."""
    height, width, bands = values.shape
    separate = tags.get("t284") == [2]
    planes = [values[..., n : n + 1] for n in range(bands)] if separate else [values]
    data, strips = b"".join(pack(plane, bits, order) for plane in planes), len(planes)
    entries = {256: [width], 257: [height], 258: [bits] * bands, 259: [1], 262: [photometric], 277: [bands]}
    entries |= {278: [height], 273: [0] * strips, 279: [len(data) // strips] * strips}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    outside = sum(4 * len(value) for value in entries.values() if len(value) > 1)
    start = 8 + 2 + 12 * len(entries) + 4
    entries[273] = [start + outside + n * (len(data) // strips) for n in range(strips)]
    directory, more = b"", b""
    for number, value in sorted(entries.items()):
        encoded = struct.pack(f"{order}{len(value)}I", *value)
        if len(value) > 1:
            encoded, more = struct.pack(f"{order}I", start + len(more)), more + encoded
        directory += struct.pack(f"{order}HHI", number, 4, len(value)) + encoded
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return header + directory + bytes(4) + more + data


def png(values: np.ndarray, bits: int, kind: str, *chunks: bytes) -> bytes:
    rows = b"".join(b"\0" + pack(row[None], bits, ">") for row in values)
    return making.png(SIZE, SIZE, bits, {"grey": 0, "rgb": 2, "la": 4, "rgba": 6}[kind], rows, *chunks)


def product() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Each mode in each depth in each format that has them, with what it should look like."""
    for kind, (bands, photometric) in KINDS.items():
        values = BANDS[..., :bands]
        for bits in (1, 2, 4, 8, 10, 12, 16, 32):
            if bits < 8 and kind != "grey":
                continue
            top = 1 if bits == 32 else 2**bits - 1
            drawn = values if bits == 32 else np.round(values * top)
            extra = {"t338": [2]} if kind in ("la", "rgba") else {}
            extra |= {"t339": [3] * bands} if bits == 32 else {}
            for order in "<>":
                for planes in (1, 2)[: 2 if bits in (8, 16) and bands > 1 else 1]:
                    name = f"tiff {kind} {bits} {order} {planes}"
                    yield name, tiff(drawn, photometric, bits, order, t284=[planes], **extra), plain(drawn / top, kind)
                if kind == "grey":
                    inverse = tiff(top - drawn, 0, bits, order, **extra)
                    yield f"white is zero {bits} {order}", inverse, plain(drawn / top, kind)
            if kind != "cmyk" and bits in (8, 16):
                yield f"png {kind} {bits}", png(drawn, bits, kind), plain(drawn / top, kind)
        eight = np.round(values * 255).astype(np.uint8)
        if kind in ("la", "rgba"):
            associated = eight.copy()
            associated[..., :-1] = np.round(eight[..., :-1] * values[..., -1:])
            yield f"associated {kind}", tiff(associated, photometric, 8, t338=[1]), plain(eight / 255, kind)
            ignored = "grey" if kind == "la" else "rgb"
            yield f"unspecified {kind}", tiff(eight, photometric, 8, t338=[0]), plain(eight / 255, ignored)
        image = Image.fromarray(eight[..., 0] if kind == "grey" else eight, {"la": "LA", "cmyk": "CMYK"}.get(kind))
        best = {"JPEG": {"quality": 98}, "AVIF": {"quality": 100}, "WEBP": {"lossless": True, "exact": True}}
        for form in (*best, "PNG", "TIFF", "TGA", "PPM", "BMP", "JPEG2000"):
            if form in ("PPM", "BMP", "JPEG") and kind in ("la", "rgba"):
                continue
            try:
                content = encode(image, form, **best.get(form, {}))
            except OSError:
                continue  # this format has no such mode
            yield f"{form} {kind}", content, plain(eight / 255, kind)
    for top in (255, 1023, 4095, 65535):
        for sign, kind in ((b"P5", "grey"), (b"P6", "rgb")):
            drawn = np.round(BANDS[..., : KINDS[kind][0]] * top)
            data = pack(drawn, 8 if top == 255 else 16, ">")
            yield f"PPM {kind} {top}", sign + b" 48 48 %d\n" % top + data, plain(drawn / top, kind)


PRODUCT = list(product())
# What Pillow does not read.
UNREAD = r" (10|32) |12 >|(zero|rgb|la|rgba|cmyk) 12|zero 16 >|tiff la 16|16 . 2|la 8 . 2"
# Reasons that say what the file holds; which of these Pillow reads may change.
TRUE_REASONS = (
    r"32-bit float, whose range is not stated|TIFF of bits, bands or compression that are not read|"
    r"bands in separate planes, which cannot be read"
)


@pytest.mark.parametrize(("name", "content", "wanted"), PRODUCT, ids=[name for name, _, _ in PRODUCT])
def test_every_mode_depth_and_format_is_the_plain_image_or_refused(
    name: str, content: bytes, wanted: np.ndarray
) -> None:
    try:
        shown = np.asarray(decode(content)).astype(float)
    except ImageError as error:
        reason = str(error)
    else:
        assert np.abs(shown - wanted).max() <= (5 if name.split()[0] in ("JPEG", "AVIF") else 3)
        return
    assert re.search(UNREAD, name)
    assert re.match(TRUE_REASONS, reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(np.round(BANDS[..., :1] * 200), 1, 8, t339=[2]), "values with a sign, whose range is not stated"),
        (tiff(np.round(BANDS[..., :1] * 20000), 1, 16, t339=[2]), "values with a sign, whose range is not stated"),
        (png(np.round(BANDS[..., :3] * 4095), 16, "rgb"), "at most 12 of 16 bits a colour used"),
        (tiff(np.round(BANDS[..., :3] * 4095), 2, 16), "at most 12 of 16 bits a colour used"),
        (encode(Image.fromarray(np.full((16, 16), 2**20, np.int32)), "TIFF"), "more than 16 bits"),
        (encode(Image.new("RGB", (16, 16)), "PCX"), "not an image in a known format"),
    ],
    ids=["signed 8", "signed 16", "12 of 16 bits, PNG", "12 of 16 bits, TIFF", "32 bits", "PCX"],
)
def test_pixels_that_cannot_be_interpreted_are_refused_with_the_true_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=f"^{reason}"):
        decode(content)


def bmp_v4(values: np.ndarray) -> bytes:
    """Write 32-bit BGRA with a mask for alpha."""
    data = values[::-1, :, [2, 1, 0, 3]].astype(np.uint8).tobytes()
    info = struct.pack("<IiiHHIIiiII", 108, SIZE, SIZE, 1, 32, 3, len(data), 0, 0, 0, 0)
    info += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(data), 0, 0, 14 + len(info)) + info + data


def test_colours_that_use_14_of_16_bits_are_accepted_and_reported_as_dark() -> None:
    dim, bright = (png(np.round(BANDS[..., :3] * top), 16, "rgb") for top in (16383, 65535))
    assert (decode_with_facts(dim).remarks, decode_with_facts(bright).remarks) == (("dim",), ())


def test_a_meaningless_alpha_channel_is_ignored_and_reported() -> None:
    eight = np.round(BANDS * 255)
    clear = eight.copy()
    clear[..., 3] = 0
    for content in (bmp_v4(clear), png(clear, 8, "rgba"), encode(Image.fromarray(clear.astype(np.uint8)), "TIFF")):
        decoded = decode_with_facts(content)
        assert decoded.remarks == ("clear",)
        assert np.abs(np.asarray(decoded.image) - plain(eight / 255, "rgb")).max() <= 1
    band = eight.copy()
    band[..., 3] = np.clip(np.random.default_rng(0).normal(120, 30, (SIZE, SIZE)), 1, 254)
    decoded = decode_with_facts(tiff(band, 2, 8, t338=[2]))
    assert decoded.remarks == ("band",)
    assert np.abs(np.asarray(decoded.image) - plain(eight / 255, "rgb")).max() <= 1
    assert decode_with_facts(tiff(eight, 2, 8, t338=[2])).remarks == ()


@pytest.mark.parametrize("kind", ["grey", "rgb"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("gamma", [1.0, 0.55])
def test_the_gamma_of_a_png_is_applied(kind: str, bits: int, gamma: float) -> None:
    values = 0.2 + 0.8 * BANDS[..., : KINDS[kind][0]]
    stored = np.round(values ** (2.2 * gamma) * (2**bits - 1))
    stated = chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    shown = np.asarray(decode(png(stored, bits, kind, stated))).astype(float)
    assert np.abs(shown - plain(values, kind)).max() <= (9 if gamma == 1 else 3)  # dark values have few levels
    srgb = chunk(b"sRGB", b"\0")
    plainly = np.asarray(decode(png(stored, bits, kind)))
    assert (np.asarray(decode(png(stored, bits, kind, stated, srgb))) == plainly).all()
    usual = chunk(b"gAMA", struct.pack(">I", 45455))
    assert (np.asarray(decode(png(stored, bits, kind, usual))) == plainly).all()


@pytest.mark.parametrize(("kind", "bits"), [("grey", 2), ("grey", 4), ("grey", 8), ("grey", 16), ("rgb", 16)])
def test_the_transparent_colour_of_a_png_is_white(kind: str, bits: int) -> None:
    values = np.round(BANDS[..., : KINDS[kind][0]] * (2**bits - 1))
    named = values[5, 7].astype(int).tolist()
    shown = np.asarray(decode(png(values, bits, kind, chunk(b"tRNS", struct.pack(f">{len(named)}H", *named)))))
    transparent = (values == values[5, 7]).all(axis=2, keepdims=True)
    assert np.abs(shown - np.where(transparent, 255, values * 255 / (2**bits - 1))).max() <= 1


TURNS = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation -> Pillow's transposition


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "tiff_lzw"])
def test_all_orientations_in_every_format_are_upright_once(orientation: int, kind: str) -> None:
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image = Image.fromarray((BANDS[:32, :, :3] * 255).astype(np.uint8))
    image.paste((255, 255, 255), (0, 0, 16, 8))
    turn = TURNS[orientation]
    wanted = image if turn is None else image.transpose(Image.Transpose(turn))
    form, options = ("TIFF", {"compression": kind}) if kind.startswith("tiff") else (kind, {})
    decoded = decode_with_facts(encode(image, form, exif=turned(orientation).tobytes(), **options))
    assert decoded.image.size == decoded.size == wanted.size
    assert np.abs(np.asarray(decoded.image).astype(int) - np.asarray(wanted)).mean() < 8


def photo(seed: int = 0) -> Image.Image:
    return noise(seed=seed).resize((400, 300), Image.Resampling.BICUBIC)


JPEGS = {
    "usual": {},
    "other codes": {"optimize": True},
    "restarts": {"restart_marker_rows": 2},
    "no subsampling": {"subsampling": 0},
    "progressive": {"progressive": True},
}


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("least", [None, 1])
def test_a_jpeg_with_its_middle_or_end_missing_is_damaged(name: str, mode: str, least: int | None) -> None:
    whole = encode(photo().convert(mode), "JPEG", quality=90, **JPEGS[name])
    decode_with_facts(whole, least=least)
    start = whole.find(b"\xff\xda") + 20
    for share in (0.3, 0.5):
        at = start + int(share * (len(whole) - start))
        for content in (
            whole[:at] + b"\xff\xd9",
            whole[:at] + bytes(400) + whole[at + 400 :],
            whole[:at] + b"\x5a\xc3" * 200 + whole[at + 400 :],
            whole[:at] + whole[at + 400 :],
        ):
            with pytest.raises(ImageError, match=r"^damaged: "):
                decode_with_facts(content, least=least)


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("colour", ["white", "black", (128, 128, 128), (127, 127, 127)])
def test_flat_and_padded_jpegs_are_not_damaged(name: str, colour: object) -> None:
    for mode in ("RGB", "L", "CMYK"):
        image = Image.new("RGB", (501, 303), colour)  # type: ignore[arg-type]
        decode_with_facts(encode(image.convert(mode), **JPEGS[name]))
        image.paste(photo(), (100, 100))
        whole = encode(image.convert(mode), **JPEGS[name])
        for padding in (b"", bytes(500), b"\0"):
            decode_with_facts(whole[:-2] + padding + whole[-2:])
        decode_with_facts(whole + bytes(500))


def test_a_jpeg_above_the_pixel_limit_is_read_if_it_can_be_decoded_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 300 * 400 - 1)
    whole = encode(photo(), "JPEG")
    assert decode_with_facts(whole, least=20).size == (400, 300)
    with pytest.raises(ImageError, match=r"^more than 119999 pixels \(400 x 300\)"):
        decode(whole)
    with pytest.raises(ImageError, match=r"^more than 119999 pixels"):
        decode(encode(photo(), "PNG"), least=20)


def test_ignored_pages_transparency_and_duplicates_are_counted(project: Project) -> None:
    folder = project.path("images/cat")
    pages = [Image.open(path) for path in sorted(folder.iterdir())[:3]]
    pages[0].save(folder / "pages.tiff", save_all=True, append_images=pages[1:])
    Image.new("RGB", (40, 40), "white").save(folder / "white.png")
    pages[1].save(folder / "again.bmp")
    pages[2].convert("RGB").point(lambda value: value // 2).save(folder / "half.png")
    clear = pages[0].convert("RGBA")
    clear.putalpha(0)
    clear.save(folder / "clear.png")
    line = said(project)
    assert "1 image has more pages or frames than the first, which is taken" in line
    assert "1 image is transparent everywhere, and taken without that" in line
    assert "1 image is of one colour" in line
    # The first page and the image without its transparency are 000.png, `again` is 001.png.
    assert "5 images the same as another when decoded (JPEG: small), though their bytes differ" in line


def test_masks_with_the_names_of_images_are_not_a_class(project: Project, refusal: Refusal) -> None:
    for number, path in enumerate(sorted(project.path("images/dog").iterdir())):
        mask = np.zeros((40, 40), np.uint8)
        mask[number:, 5:30] = 255
        Image.fromarray(mask).save(path)
    line = refusal(project, "split")
    assert "dog in images has the file names of cat, and at most 16 colours an image: masks, not a class" in line
    for path in project.path("images/dog").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    assert project.run("split") == 0
