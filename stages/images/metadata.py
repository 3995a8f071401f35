"""PNG and JPEG without their metadata, for files whose pixels are good and whose metadata is not.

PNG: https://www.w3.org/TR/png-3/#5DataRep. JPEG: https://www.w3.org/Graphics/JPEG/itu-t81.pdf, annex B.
"""

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_TRANSPARENCY = b"tRNS"  # the only chunk that changes pixels although a decoder may pass it by

_JPEG = b"\xff\xd8"
_JPEG_SCAN = 0xDA
_JPEG_EXIF, _JPEG_ADOBE = (0xE1, b"Exif\0\0"), (0xEE, b"Adobe")  # orientation; how colours are stored
_JPEG_ADOBE_SIZE = 4 + 12


def without_metadata(content: bytes) -> Iterator[bytes]:
    """Yield a PNG or JPEG with less and less metadata; nothing for another file.

    First, what may matter for the pixels stays: a PNG's profile, EXIF and so on with correct checksums, a JPEG's
    EXIF. Then only what no decoder can do without.
    """
    if content.startswith(_PNG):
        chunks = list(_chunks(content))
        for keep in (_is_sound, _is_transparency):
            yield _PNG + b"".join(chunk for chunk in chunks if _is_critical(chunk) or keep(chunk))
    elif content.startswith(_JPEG):
        segments = list(_segments(content))
        for spared in ((_JPEG_EXIF, _JPEG_ADOBE), (_JPEG_ADOBE,)):
            yield _JPEG + b"".join(
                segment for segment in segments if not _is_application(segment) or _is_one_of(segment, spared)
            )


def _chunks(content: bytes) -> Iterator[bytes]:
    """Yield length, type, data and checksum of each chunk of a PNG together; the last one may be cut short."""
    position = len(_PNG)
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4].rjust(4, b"\0"))
        end = position + 12 + length
        yield content[position:end]
        position = end


def _is_critical(chunk: bytes) -> bool:
    return chunk[4:5].isupper()


def _is_transparency(chunk: bytes) -> bool:
    return chunk[4:8] == _PNG_TRANSPARENCY


def _is_sound(chunk: bytes) -> bool:
    return chunk[4:8] not in _PNG_TEXTS and chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))


def _segments(content: bytes) -> Iterator[bytes]:
    """Yield marker, length and data of each segment of a JPEG together, and all from the first scan on as one."""
    position = len(_JPEG)
    while content[position : position + 1] == b"\xff" and len(content) > position + 3:
        if content[position + 1] == _JPEG_SCAN:
            break
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        yield content[position:end]
        position = end
    yield content[position:]


def _is_application(segment: bytes) -> bool:
    """Whether a segment is an application's or a comment."""
    return len(segment) > 1 and segment[0] == 0xFF and (0xE0 <= segment[1] <= 0xEF or segment[1] == 0xFE)


def _is_one_of(segment: bytes, spared: tuple[tuple[int, bytes], ...]) -> bool:
    whole = segment[1] != _JPEG_ADOBE[0] or len(segment) >= _JPEG_ADOBE_SIZE
    return whole and any(segment[1] == marker and segment[4:].startswith(name) for marker, name in spared)
