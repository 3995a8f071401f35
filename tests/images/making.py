"""What the tests of this folder share: how files are made, and what `split` says of them."""

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from conftest import Project
from PIL import Image

Refusal = Callable[[Project, str], str]


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def noise(height: int = 24, width: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind: bytes, data: bytes, damage: int = 0) -> bytes:
    """A piece of a PNG; with `damage`, its checksum is wrong."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damage)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def said(project: Project) -> str:
    """Run `split`, which has to succeed; its last line."""
    output = io.StringIO()
    with redirect_stdout(output):
        assert project.run("split") == 0
    return output.getvalue().splitlines()[-1]
