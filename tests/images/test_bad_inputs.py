"""A hundred files and thirty tables as they should not be, each told by what is wrong with it or taken for what it is.

Run as a script, it prints what became of each.
"""

import io
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from conftest import STAGES, Project, make_images
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

TAKEN = ""
Files = dict[str, tuple[bytes, str]]


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 48), seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    content = io.BytesIO()
    (image or picture()).save(content, kind, **options)  # type: ignore[arg-type]
    return content.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


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
    pairs = {
        "png as.jpg": "PNG",
        "jpeg as.png": "JPEG",
        "webp as.jpg": "WEBP",
        "gif as.png": "GIF",
        "tiff as.jpg": "TIFF",
    }
    files = {name: (encode(kind, picture(seed=20 + n)), TAKEN) for n, (name, kind) in enumerate(pairs.items())}
    names = [
        "UPPER.JPG",
        "two.dots.jpeg",
        "with space .png",
        "-dash.png",
        "quote'\".png",
        "ünï.png",
        "日本.png",
        "#&?.png",
    ]
    return files | {name: (encode("PNG", picture(seed=40 + n)), TAKEN) for n, name in enumerate(names)}


def has_odd_pixels() -> Files:
    deep = np.random.default_rng(1).integers(0, 65536, (48, 64), dtype=np.uint16)
    rows = b"".join(b"\0" + bytes(np.random.default_rng(n).integers(0, 256, 64 * 6, dtype=np.uint8)) for n in range(48))
    files = {
        f"{mode}.{kind}": (encode(name, picture(mode, seed=60 + n)), TAKEN)
        for n, (mode, kind, name) in enumerate(
            [
                *(("1", "png", "PNG"), ("L", "jpg", "JPEG"), ("LA", "png", "PNG"), ("P", "gif", "GIF")),
                *(("RGBA", "webp", "WEBP"), ("CMYK", "jpg", "JPEG"), ("CMYK", "tif", "TIFF")),
                *(("YCbCr", "jpg", "JPEG"), ("LAB", "tif", "TIFF")),
            ]
        )
    }
    files |= {
        "16 bit grey.png": (encode("PNG", Image.fromarray(deep)), TAKEN),
        "16 bit colour.png": (png(64, 48, 16, 2, rows), TAKEN),
        "float.tif": (encode("TIFF", Image.fromarray(deep.astype(np.float32))), "32-bit float"),
        "integers.tif": (encode("TIFF", Image.fromarray(deep.astype(np.int32))), TAKEN),
        "all transparent.png": (encode("PNG", Image.new("RGBA", (64, 48), (9, 9, 9, 0))), TAKEN),
        "two frames.gif": (encode("GIF", picture(seed=80), save_all=True, append_images=[picture(seed=81)]), TAKEN),
        "two pages.tif": (encode("TIFF", picture(seed=82), save_all=True, append_images=[picture(seed=83)]), TAKEN),
    }
    return files


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
    rows = b"".join(
        b"\0" + bytes(np.random.default_rng(n + 99).integers(0, 256, 64 * 3, dtype=np.uint8)) for n in range(48)
    )
    return {
        "orientation 9.jpg": (encode("JPEG", picture(seed=91), exif=b"Exif\0\0" + tags.tobytes()), TAKEN),
        "broken exif.jpg": (encode("JPEG", picture(seed=92), exif=b"Exif\0\0II*\0" + b"\xff" * 30), TAKEN),
        "broken profile.jpg": (encode("JPEG", picture(seed=93), icc_profile=b"no profile" * 20), TAKEN),
        "broken profile.png": (encode("PNG", picture(seed=94), icc_profile=b"no profile" * 20), TAKEN),
        "much hidden text.png": (png(64, 48, 8, 2, rows, bomb), TAKEN),
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


def run_on_files(project: Project) -> dict[str, str]:
    """Split a data set with all of them; file -> the reason why it is left out, of those that are."""
    folder = make_images(project.path("images")) / "cat"
    for name, (content, _) in FILES.items():
        (folder / name).write_bytes(content)
    for name, (make, _) in is_no_file().items():
        make(folder / name)
    project.set("split.rejected_limit", 1.0)
    assert project.run("split") == 0
    return {Path(one["path"]).name: one["reason"] for one in project.split_report()["rejected"]}


NAMES = {name: wanted for name, (_, wanted) in {**FILES, **is_no_file()}.items()}


def test_a_hundred_files_are_taken_or_left_out_for_what_is_wrong_with_them(project: Project) -> None:
    found = run_on_files(project)
    assert len(NAMES) > 100
    wrong = {
        name: found.get(name)
        for name, wanted in NAMES.items()
        if (name in found) != bool(wanted) or not found.get(name, "").startswith(wanted)
    }
    assert not wrong
    # What is taken has passed every stage that follows.
    project.set("split.seed", 1)
    assert project.run(*STAGES[:5]) == 0


def say(table: str, **settings: object) -> str:
    """Split twelve images a class by a table; the line that it ends with, or that it is refused with."""
    with tempfile.TemporaryDirectory() as name:
        project = Project(Path(name))
        make_images(project.path("images"), classes=("x", "y"), count=12, size=16)
        project.path("labels.csv").write_bytes(table.encode("utf-8", "surrogateescape"))
        for key, value in {"data.labels": "labels.csv", **settings}.items():
            project.set(key, value)
        output, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(output), redirect_stderr(errors):
            project.run("split")
        return (errors.getvalue() or output.getvalue()).strip().splitlines()[-1]


def rows(head: str, row: Callable[[str, str, int], str]) -> str:
    """A table with a row for each image: its path, its class and its number."""
    paths = [f"{name}/{number:03d}.png" for name in "xy" for number in range(12)]
    return "\n".join([head, *(row(path, path[0], number) for number, path in enumerate(paths))])


PLAIN = rows("path,label", lambda path, name, _: f"{path},{name}")
BOTH = "classes: x 12, y 12"
TABLES = {
    "as it should be": (PLAIN, BOTH),
    "semicolons": (PLAIN.replace(",", ";"), BOTH),
    "tabs": (PLAIN.replace(",", "\t"), BOTH),
    "a byte order mark": ("\ufeff" + PLAIN, BOTH),
    "lines of Windows": (PLAIN.replace("\n", "\r\n"), BOTH),
    "lines of an old Mac": (PLAIN.replace("\n", "\r"), BOTH),
    "all quoted": (rows('"path","label"', lambda path, name, _: f'"{path}","{name}"'), BOTH),
    "spaces around": (rows("path , label", lambda path, name, _: f" {path} , {name} "), BOTH),
    "capitals in the first line": (PLAIN.replace("path,label", "Path,LABEL"), BOTH),
    "backslashes": (PLAIN.replace("/", "\\"), BOTH),
    "dots in front": (PLAIN.replace("\n", "\n./"), BOTH),
    "the folder in front": (PLAIN.replace("\n", "\nimages/"), BOTH),
    "other extensions": (PLAIN.replace(".png", ".JPG"), "24 paths of labels.csv found by another case or extension"),
    "no extensions": (PLAIN.replace(".png", ""), "24 paths of labels.csv found by another case or extension"),
    "empty lines": (PLAIN.replace("\n", "\n\n"), BOTH),
    "every row twice": (PLAIN + PLAIN[PLAIN.index("\n") :], "24 rows of labels.csv repeated"),
    "two labels for an image": (PLAIN + "\nx/000.png,y", "1 rejected"),
    "an image that is not there": (PLAIN + "\nx/999.png,x", "1 rejected"),
    "an image without a label": (PLAIN.replace("x/000.png,x", "x/000.png,"), "1 rejected"),
    "a label that pandas made": (PLAIN.replace("x/000.png,x", "x/000.png,NaN"), "1 rejected"),
    "half of the images": ("\n".join(PLAIN.split("\n")[:20]), "5 images that the table does not list left out"),
    "numbers as floats": (rows("path,label", lambda path, _, n: f"{path},{n % 2}{'.0' * (n < 8)}"), "same number"),
    "a column too many": (rows("path,label,age", lambda path, name, n: f"{path},{name},{n}"), "not used: age"),
    "a split by other words": (
        rows("path,label,split", lambda path, name, n: f"{path},{name},{('Training', 'dev', 'TEST')[n % 3]}"),
        "split as given",
    ),
    "a split that is none": (
        rows("path,label,split", lambda path, name, _: f"{path},{name},maybe"),
        "error: data.labels: labels.csv, line 2: split is 'maybe'",
    ),
    "several labels each": (
        rows("path,label", lambda path, name, n: f'{path},"{name}|{"z" if n % 2 else "w"}"'),
        "error: data.labels: labels.csv has multi-label rows",
    ),
    "one-hot columns": (
        rows("path,x,y", lambda path, name, _: f"{path},{int(name == 'x')},{int(name == 'y')}"),
        "one-hot",
    ),
    "one class": (rows("path,label", lambda path, *_: f"{path},x"), "holds one class only"),
    "no first line": (PLAIN.partition("\n")[2], "should have one column path"),
    "a cell too many": (PLAIN + "\nx/001.png,x,more", "line 26: has 3 cells, the first line 2"),
    "a quote left open": (PLAIN.replace("y/005", '"y/005'), "error: data.labels: labels.csv, line"),
    "nothing": ("", "should have one column path in its first line, has nothing"),
    "a first line alone": ("path,label\n", "gives no image a label"),
    "no UTF-8": (PLAIN.replace(",x", ",\udce9"), "is not UTF-8"),
    "a way out of the folder": (PLAIN + "\n../../secret.png,x", "is not below data.path"),
    "addresses": (PLAIN.replace("\n", "\nhttps://example.com/"), "all 12 images of class 'x' are bad"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_an_odd_table_is_understood_or_refused_with_what_is_wrong(kind: str) -> None:
    table, wanted = TABLES[kind]
    assert wanted in say(table)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = run_on_files(Project(Path(name)))
    for name in NAMES:
        print(f"{name:28s} {found.get(name, 'taken')}")
    for kind, (table, _) in TABLES.items():
        print(f"{kind:28s} {say(table)}")
