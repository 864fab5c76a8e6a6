"""What of a PNG makes its pixels: the chunks that a decoder needs, the colour that is clear, and which way is up.

Metadata of any length (editing histories, generation parameters, profiles) are no reason to refuse pixels. So decoders
get a PNG without them: nothing is unpacked but what may say which way is up, and that to a limit.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 1 << 24  # of a text that is searched for the orientation
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TELLING = _PROFILE, _XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"
_GREY, _RGB = 0, 2  # colour types that have one clear colour


def pixels_alone(data: bytes) -> bytes:
    """The PNG without what its pixels do not come from: one image, the first frame of an animation.

    Chunks that a decoder must know stay whatever they are, and from the first that is cut on all stays as it is. A
    clear colour is given as decoders compare it: of samples brought to 8 bits, but for grey of 16 bits.
    """
    kept, dropped, end = [SIGNATURE], False, len(SIGNATURE)
    depth = colour = 0
    for kind, start, stop in _chunks(data):
        end = stop
        if kind == b"IHDR" and stop - start == 25:
            depth, colour = data[start + 16], data[start + 17]
        if kind == b"tRNS" and colour in (_GREY, _RGB):
            kept.append(_clear_colour(data[start + 8 : stop - 4], depth, colour))
            dropped = True
        elif kind in _PIXELS or not kind[0] & 0x20:  # an upper-case letter: critical
            kept.append(data[start:stop])
        else:
            dropped = True
    return b"".join((*kept, data[end:])) if dropped else data


def _clear_colour(samples: bytes, depth: int, colour: int) -> bytes:
    if len(samples) % 2 or not samples:
        return b""
    values = [value & ((1 << depth) - 1) for value in struct.unpack(f">{len(samples) // 2}H", samples)]
    if depth < 8:
        values = [value * 255 // ((1 << depth) - 1) for value in values]
    elif depth == 16 and colour == _RGB:
        values = [value >> 8 for value in values]
    body = b"tRNS" + struct.pack(f">{len(values)}H", *values)
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def orientation_data(data: bytes) -> dict[str | tuple[int, int], Any]:
    """Where a PNG may say which way is up, before or behind its pixels, under the names that Pillow gives it.

    Returns:
        ``exif``, if there is an eXIf chunk or the hexadecimal text that stood for it before there were any; and
        ``XML:com.adobe.xmp``.
    """
    found: dict[str | tuple[int, int], Any] = {}
    seen: set[bytes] = set()  # of each kind of text the first counts: each costs time to unpack
    for kind, start, stop in _chunks(data):
        body = memoryview(data)[start + 8 : stop - 4]
        if kind == b"eXIf" and len(body) <= MAX_TEXT_BYTES:
            found["exif"] = bytes(body)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            name, nul, rest = bytes(body[:80]).partition(b"\0")
            if name not in _TELLING or name in seen:
                continue
            seen.add(name)
            if name == _PROFILE and nul and kind != b"iTXt":
                text = body[len(name) + 1 :] if kind == b"tEXt" else _unpacked(body[len(name) + 2 :])
                digits = b"".join(bytes(text[:MAX_TEXT_BYTES]).split(b"\n")[3:])
                if re.fullmatch(rb"(?:[0-9a-fA-F]{2})+", digits):
                    found.setdefault("exif", bytes.fromhex(digits.decode()))
            elif name == _XMP and kind == b"iTXt" and rest[:1]:
                packed = rest[0] == 1
                text = bytes(body[len(name) + 3 :][:MAX_TEXT_BYTES])
                _, _, text = text.partition(b"\0")[2].partition(b"\0")  # behind language and translated keyword
                found["XML:com.adobe.xmp"] = bytes(_unpacked(text) if packed else text).decode("utf-8", "replace")
    return found


def _unpacked(packed: bytes | memoryview) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, MAX_TEXT_BYTES)
    except zlib.error:
        return b""


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """``(kind, start, stop)`` of the chunks that are all there."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if stop > len(data):
            return
        yield data[start + 4 : start + 8], start, stop
        start = stop
