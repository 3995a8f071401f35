"""A hundred files as they should not be, each told by what is wrong with it or taken for what it is."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import making
import numpy as np
from conftest import STAGES, Project
from making import chunk, png
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

TAKEN = ""
Files = dict[str, tuple[bytes, str]]


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 48), seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    return making.encode(image or picture(), kind, **options)


def drawn(width: int, seed: int = 0) -> bytes:
    """48 rows of a PNG, each of 64 pixels of so many bytes."""
    return b"".join(
        b"\0" + bytes(np.random.default_rng(seed + n).integers(0, 256, 64 * width, dtype=np.uint8)) for n in range(48)
    )


def is_no_image() -> Files:
    starts = {
        "empty.jpg": b"",
        "zeros.jpg": bytes(4096),
        "text.jpg": b"not an image at all\n" * 50,
        "download.png": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        "answer.webp": b'{"error": "rate limited"}',
        "archive.jpg": b"PK\x03\x04" + bytes(200),
        "film.jpg": b"\0\0\0\x20ftypisom" + bytes(200),
        "page.tif": b"%PDF-1.7\n" + bytes(200),
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "layers.tif": b"8BPS\0\1" + bytes(200),
        "pickle.jpg": b"\x80\x04\x95" + bytes(100),
        "array.png": b"\x93NUMPY\x01\x00" + bytes(100),
        "icon.png": encode("ICO"),
        "video frame.jpg": b"RIFF\x24\x00\x00\x00AVI LIST" + bytes(100),
    }
    return {name: (content, "not an image" if content else "empty file") for name, content in starts.items()}


def is_cut() -> Files:
    kinds = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "ppm": "PPM"}
    kinds |= {"jp2": "JPEG2000", "avif": "AVIF", "tga": "TGA"}
    files = {}
    for kind in kinds:
        content = encode(kinds[kind])
        for part in (4, 2):
            files[f"cut to 1 of {part}.{kind}"] = content[: len(content) // part], "damaged"
        files[f"cut at the end.{kind}"] = content[: -max(8, len(content) // 50)], "damaged"
    progressive = encode("JPEG", progressive=True)
    files["cut progressive.jpg"] = progressive[: len(progressive) // 2], "damaged"
    return files


def is_changed() -> Files:
    """Bytes in the middle are others: as after a bad disk."""
    files = {}
    for name, kind in {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "jp2": "JPEG2000"}.items():
        content = bytearray(encode(kind, picture(size=(320, 240), seed=4)))
        middle = len(content) // 2
        content[middle : middle + 40] = bytes(40)
        files[f"forty zeros.{name}"] = bytes(content), "damaged"
    # What OpenJPEG makes of it cannot be told from an image.
    files["forty zeros.jp2"] = files["forty zeros.jp2"][0], TAKEN
    whole = encode("PNG")
    files["wrong checksum.png"] = whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:], "damaged"
    files["text mode.png"] = whole.replace(b"\r\n", b"\n"), "damaged"
    return files


def is_named_otherwise() -> Files:
    pairs = {"png as.jpg": "PNG", "jpeg as.png": "JPEG", "webp as.jpg": "WEBP", "gif as.png": "GIF"}
    odd = ["UPPER.JPG", "two.dots.jpeg", "with space .png", "-dash.png", "quote'\".png", "ünï.png", "日本.png"]
    odd += ["#&?.png", "a,b.png", "a\nb.png", "a\r\nb.png", "$(x) ;&.png", " .png", os.fsdecode(b"latin \xe9.png")]
    kinds = {**pairs, **dict.fromkeys(odd, "PNG")}
    return {name: (encode(kind, picture(seed=20 + n)), TAKEN) for n, (name, kind) in enumerate(kinds.items())}


def has_odd_pixels() -> Files:
    deep = np.random.default_rng(1).integers(0, 65536, (48, 64), dtype=np.uint16)
    modes = [("1", "png", "PNG"), ("L", "jpg", "JPEG"), ("LA", "png", "PNG"), ("P", "gif", "GIF")]
    modes += [("RGBA", "webp", "WEBP"), ("CMYK", "jpg", "JPEG"), ("CMYK", "tif", "TIFF")]
    modes += [("YCbCr", "jpg", "JPEG"), ("LAB", "tif", "TIFF")]
    files = {
        f"{mode}.{kind}": (encode(name, picture(mode, seed=60 + n)), TAKEN)
        for n, (mode, kind, name) in enumerate(modes)
    }
    return files | {
        "16 bit grey.png": (encode("PNG", Image.fromarray(deep)), TAKEN),
        "16 bit colour.png": (png(64, 48, 16, 2, drawn(6)), TAKEN),
        "float.tif": (encode("TIFF", Image.fromarray(deep.astype(np.float32))), "32-bit float"),
        "integers.tif": (encode("TIFF", Image.fromarray(deep.astype(np.int32))), TAKEN),
        "all transparent.png": (encode("PNG", Image.new("RGBA", (64, 48), (9, 9, 9, 0))), TAKEN),
        "two frames.gif": (encode("GIF", picture(seed=80), save_all=True, append_images=[picture(seed=81)]), TAKEN),
        "two pages.tif": (encode("TIFF", picture(seed=82), save_all=True, append_images=[picture(seed=83)]), TAKEN),
    }


def has_odd_sizes() -> Files:
    return {
        "one pixel.png": (encode("PNG", picture(size=(1, 1), seed=1)), TAKEN),
        "two pixels.png": (encode("PNG", picture(size=(2, 2), seed=2)), TAKEN),
        "a line.png": (encode("PNG", picture(size=(3000, 1), seed=3)), "thinner than 1:100"),
        "a column.png": (encode("PNG", picture(size=(1, 3000), seed=3)), "thinner than 1:100"),
        "no width.png": (png(0, 48, 8, 2, b""), "damaged"),
        "claims 10 gigapixels.png": (png(100_000, 100_000, 8, 2, b""), "more than 89478485 pixels"),
        "claims 4 gigapixels.gif": (
            b"GIF89a\xff\xff\xff\xff\0\0\0," + bytes(4) + b"\xff\xff\xff\xff\0\2\1\0\0;",
            "more than 89478485 pixels",
        ),
        "claims more.bmp": (encode("BMP").replace(struct.pack("<ii", 64, 48), struct.pack("<ii", 64, 4800)), "damaged"),
    }


def has_odd_metadata() -> Files:
    tags = ImageFileDirectory_v2()
    tags[0x0112] = 9
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))
    return {
        "orientation 9.jpg": (encode("JPEG", picture(seed=91), exif=b"Exif\0\0" + tags.tobytes()), TAKEN),
        "broken exif.jpg": (encode("JPEG", picture(seed=92), exif=b"Exif\0\0II*\0" + b"\xff" * 30), TAKEN),
        "broken profile.jpg": (encode("JPEG", picture(seed=93), icc_profile=b"no profile" * 20), TAKEN),
        "broken profile.png": (encode("PNG", picture(seed=94), icc_profile=b"no profile" * 20), TAKEN),
        "much hidden text.png": (png(64, 48, 8, 2, drawn(3, seed=99), bomb), TAKEN),
        "something behind.jpg": (encode("JPEG", picture(seed=95)) + b"PK\x03\x04" * 100, TAKEN),
        "something behind.png": (encode("PNG", picture(seed=96)) + b"\0" * 100, TAKEN),
    }


def is_no_file() -> dict[str, tuple[Callable[[Path], object], str]]:
    return {
        "folder.jpg": (Path.mkdir, TAKEN),
        "broken link.jpg": (lambda path: path.symlink_to("nowhere"), "a broken link"),
        "link to itself.jpg": (lambda path: path.symlink_to(path.name), "a link that loops"),
        "good link.jpg": (lambda path: path.symlink_to(path.with_name("000.png")), TAKEN),
        "pipe.jpg": (os.mkfifo, "not a regular file"),
        ".hidden.jpg": (lambda path: path.write_bytes(b"no image"), TAKEN),
        "._resource.jpg": (lambda path: path.write_bytes(b"no image"), TAKEN),
        "Thumbs.db": (lambda path: path.write_bytes(b"no image"), TAKEN),
        "notes.txt": (lambda path: path.write_bytes(b"no image"), TAKEN),
    }


FILES = is_no_image() | is_cut() | is_changed() | is_named_otherwise() | has_odd_pixels() | has_odd_sizes()
FILES |= has_odd_metadata()


NAMES = {name: wanted for name, (_, wanted) in {**FILES, **is_no_file()}.items()}


def test_a_hundred_files_are_accepted_or_rejected_with_the_right_reason(project: Project) -> None:
    folder = project.path("images/cat")
    for name, (content, _) in FILES.items():
        (folder / name).write_bytes(content)
    for name, (make, _) in is_no_file().items():
        make(folder / name)
    project.set("split.rejected_limit", 1.0)
    assert project.run("split") == 0
    found = {Path(one["path"]).name: one["reason"] for one in project.split_report()["rejected"]}
    assert len(NAMES) > 100
    wrong = {
        name: found.get(name)
        for name, wanted in NAMES.items()
        if (name in found) != bool(wanted) or not found.get(name, "").startswith(wanted)
    }
    assert not wrong
    taken = {Path(entry.path).name for entries in project.parts().values() for entry in entries}
    assert {name for name, (_, wanted) in FILES.items() if not wanted} <= taken
    # What is taken has passed every stage that follows.
    project.set("split.seed", 1)
    assert project.run(*STAGES[:5]) == 0
