"""Whether the data of a JPEG is whole: libjpeg paints what is missing grey, and Pillow does not say so.

https://www.w3.org/Graphics/JPEG/itu-t81.pdf, annexes B (markers), C and F (Huffman codes), G (progressive).
"""

import re

_SCAN, _END, _TABLES, _INTERVAL, _PROGRESSIVE = 0xDA, b"\xff\xd9", 0xC4, 0xDD, 0xC2
_BASELINE = (0xC0, 0xC1)
_READ = (*_BASELINE, _PROGRESSIVE, _TABLES, _INTERVAL, _SCAN)
_RESTARTS = re.compile(rb"\xff[\xd0-\xd7]")
# Hardly any picture has codes of so many zero bytes; what is left of a block that a disk lost is.
_ZEROS = bytes(64)
# Counting takes a second for so many bytes; zeros alone, which flat pictures have too, are not worth more.
_LONG = 2**19
_GREY = (127, 128)  # a block without data; by either rounding, or inverted as in CMYK
_STOP = 64  # coefficients of a block

_Codes = list[tuple[int, int]]  # by the next 16 bits: how many belong to a code and its value, and the value's place


def find_damage(content: bytes, corner: object) -> str | None:
    """Say what is wrong with the data of a JPEG that libjpeg could decode, `None` where nothing is.

    What costs little is asked of every picture; the codes are counted only where that raises suspicion.

    Args:
        content: of the file.
        corner: the last pixel as decoded, before any conversion.
    """
    position, kind, frame, interval, tables = 2, 0, b"", 0, b""
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker, end = content[position + 1], position + 2 + (content[position + 2] << 8 | content[position + 3])
        if marker in _READ:
            data = content[position + 4 : end]
            if marker == _TABLES:
                tables += data
            elif marker == _INTERVAL:
                interval = int.from_bytes(data[:2], "big")
            elif marker == _SCAN:
                break
            else:
                kind, frame = marker, data
        position = end
    else:
        return None
    if not frame:
        return None
    first, position = position, end
    if kind == _PROGRESSIVE:
        return _missing_scans(content, frame, first, content.find(_END, position))
    zeros = content.find(_ZEROS, position)
    zeros = zeros if content.find(_END, position, zeros) < 0 else -1
    grey = all(level in _GREY for level in (corner if isinstance(corner, tuple) else (corner,)))
    if zeros >= 0 or grey or interval:
        scan = content[position : content.find(_END, position)]
        if zeros >= 0 or grey or _lacks_restart(scan):
            most = None if grey else _LONG
            return _count_codes(scan, frame, data, _split_tables(tables), interval, most)
    return None


def _split_tables(data: bytes) -> dict[int, bytes]:
    tables = {}
    while len(data) > 17:
        size = 17 + sum(data[1:17])
        tables[data[0]] = data[1:size]
        data = data[size:]
    return tables


def _missing_scans(content: bytes, frame: bytes, first: int, end: int) -> str | None:
    """Say whether a progressive JPEG lacks a scan that some coefficient needs."""
    exact: dict[tuple[int, int], bool] = {}
    position = first
    while 0 <= position < end:
        number = content[position + 4]
        header = content[position + 5 : position + 8 + 2 * number]
        low, high, bits = header[2 * number :]
        for component in header[: 2 * number : 2]:
            exact |= {(component, place): bits & 15 == 0 for place in range(low, high + 1)}
        position = content.find(bytes([0xFF, _SCAN]), position + 2, end)
    wanted = 64 * frame[5]
    return None if sum(exact.values()) >= wanted else "its data ends early"


def _lacks_restart(scan: bytes) -> bool:
    found = [match[0][1] & 7 for match in _RESTARTS.finditer(scan)]
    return any(number != place % 8 for place, number in enumerate(found))


def _read_codes(table: bytes) -> _Codes:
    """Return, for each 16 bits that may come next, the bits of a code with its value and the places that it takes."""
    found: _Codes = []
    values = iter(table[16:])
    for length in range(1, 17):
        for _ in range(table[length - 1]):
            value = next(values)
            found += [(length + (value & 15), _STOP if value == 0 else 1 + (value >> 4))] * (1 << (16 - length))
    return found + [(0, 0)] * (0x10000 - len(found))


def _count_codes(
    scan: bytes, frame: bytes, header: bytes, tables: dict[int, bytes], interval: int, most: int | None
) -> str | None:
    """Say whether a baseline scan of all components holds exactly as many blocks as the picture has.

    Of more than `most` bytes, they are not counted.
    """
    number = frame[5]
    if header[0] != number:
        return None
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    samplings = [(frame[7 + 3 * one] >> 4, frame[7 + 3 * one] & 15) for one in range(number)]
    across, down = (max(one) for one in zip(*samplings, strict=True)) if number > 1 else (1, 1)
    units = -(-width // (8 * across)) * -(-height // (8 * down))
    codes = {key: _read_codes(table) for key, table in tables.items()}
    blocks = []
    for one, (horizontal, vertical) in enumerate(samplings):
        chosen = header[2 + 2 * one]
        pair = codes.get(chosen >> 4), codes.get(16 + (chosen & 15))
        if pair[0] is None or pair[1] is None:
            return None
        blocks += [(pair[0], pair[1])] * (horizontal * vertical if number > 1 else 1)
    pieces = _RESTARTS.split(scan) if interval else [scan]
    # Zero bits are long runs of empty blocks, or else of blocks full of coefficients, which no picture has.
    full = _ZEROS in scan.rstrip(b"\0") and any(others[0][1] != _STOP for _, others in blocks)
    if full or (interval and len(pieces) != -(-units // interval)):
        return "its data has a hole"
    if most is not None and len(scan) > most:
        return None
    for place, piece in enumerate(pieces):
        here = min(interval, units - place * interval) if interval else units
        data = piece.replace(b"\xff\x00", b"\xff")
        used = _measure(data, blocks, here)
        if used is None or used > 8 * len(data) + 8:
            return "its data ends early"
        if len(data[(used + 7) // 8 :].strip(b"\0")) > 1:  # some cameras fill up with zeros
            return "its data has a hole"
    return None


def _measure(data: bytes, blocks: list[tuple[_Codes, _Codes]], units: int) -> int | None:
    """Return how many bits so many units of blocks take, `None` where what is there is no code or is not enough."""
    from array import array  # here: hardly any picture gets so far

    padded = data + bytes(8)
    windows = array("I", (a << 16 | b << 8 | c for a, b, c in zip(padded, padded[1:], padded[2:], strict=False)))
    bit, last = 0, 8 * len(data) + 16
    for _ in range(units):
        for first, others in blocks:
            if bit > last:
                return None
            length, _ = first[windows[bit >> 3] >> (8 - (bit & 7)) & 0xFFFF]
            if not length:
                return None
            bit += length
            place = 1
            while place < _STOP:
                if bit > last:
                    return None
                length, step = others[windows[bit >> 3] >> (8 - (bit & 7)) & 0xFFFF]
                if not length:
                    return None
                bit += length
                place += step
            if place > _STOP and step != _STOP:
                return None
    return bit
