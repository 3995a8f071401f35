"""PNG without its metadata: https://www.w3.org/TR/png-3/#5DataRep."""

import struct
import zlib
from collections.abc import Iterator

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_NEEDED = b"tRNS"  # the only chunk that changes pixels although a decoder may pass it by


def is_png(content: bytes) -> bool:
    """Whether a file begins as PNG does."""
    return content.startswith(_SIGNATURE)


def without_metadata(content: bytes) -> Iterator[bytes]:
    """Yield the PNG without its texts and what has a wrong checksum, then with nothing but its pixels."""
    chunks = list(_chunks(content))
    for keep in (_is_sound, _is_needed):
        yield _SIGNATURE + b"".join(chunk for chunk in chunks if _is_critical(chunk) or keep(chunk))


def _chunks(content: bytes) -> Iterator[bytes]:
    """Yield length, type, data and checksum of each chunk together; the last one may be cut short."""
    position = len(_SIGNATURE)
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4].rjust(4, b"\0"))
        end = position + 12 + length
        yield content[position:end]
        position = end


def _is_critical(chunk: bytes) -> bool:
    return chunk[4:5].isupper()


def _is_needed(chunk: bytes) -> bool:
    return chunk[4:8] == _NEEDED


def _is_sound(chunk: bytes) -> bool:
    return chunk[4:8] not in _TEXTS and chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
