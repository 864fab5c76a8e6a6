"""JPEG's segments: what stands before the pixels, how many scans there are, and whether all of them are there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

START_OF_IMAGE, END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
START_OF_SCAN, APP0, ADOBE = 0xDA, 0xE0, 0xEE
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
METADATA = frozenset((*range(0xE0, 0xF0), 0xFE))
_SEQUENTIAL = (0xC0, 0xC1)
_WITHOUT_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xDA)))
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_FILLINGS = (bytes(64), b"\xff\x00" * 64)  # bits that are all 0, and all 1


def count_scans(data: bytes) -> int:
    """No fewer scans than a decoder would go through; 0 for what is no JPEG."""
    components = 0
    for marker, start, _ in segments(data):
        if marker in FRAMES:
            components = data[start + 9] if marker in _SEQUENTIAL else 256
        elif marker == START_OF_SCAN and 0 < components <= data[start + 4]:
            return 1  # all components, whole: decoders look for no further scan
    return data.count(b"\xff\xda") if data.startswith(START_OF_IMAGE) else 0


def segments(data: bytes, start: int = 2) -> Iterator[tuple[int, int, int]]:
    """``(marker, start, end)`` of a JPEG's segments up to its first scan's header; fewer where it is malformed.

    What stands here stands so for decoders: nothing is given after a marker without a length or of bytes between two
    segments, where they may go on otherwise.

    Args:
        data: encoded bytes; those that are no JPEG have no segments.
        start: where the first segment begins.
    """
    if not data.startswith(START_OF_IMAGE):
        return
    while data[start : start + 1] == b"\xff" and start + 10 <= len(data):
        marker = data[start + 1]
        if marker == 0xFF:  # may fill the space between two segments
            start += 1
            continue
        length = data[start + 2] << 8 | data[start + 3]
        if marker in _WITHOUT_LENGTH or length < 2:
            return
        yield marker, start, start + 2 + length
        if marker == START_OF_SCAN:
            return
        start += 2 + length


def ended(data: bytes, pixels: Callable[[bytes], object]) -> bytes | None:
    """A JPEG that lacks nothing but its end marker, with one; None where some of its pixels are missing.

    What is missing is decoded from whatever follows. So the JPEG is whole if its pixels are the same whatever that is,
    and if its scans bring every coefficient to its last bit.

    Args:
        data: encoded bytes that a decoder found to be cut.
        pixels: decodes them to something that is equal where all pixels are.
    """
    data = data.rstrip(b"\xff")
    if not _is_refined(data):
        return None
    first, second = (pixels(data + filling + END_OF_IMAGE) for filling in _FILLINGS)
    return data + END_OF_IMAGE if first == second else None


def _is_refined(data: bytes) -> bool:
    """Whether there is a last scan for every coefficient of every component."""
    components: set[int] = set()
    final: dict[int, set[int]] = {}
    start: int | None = 2
    while start is not None:
        at, start = start, None
        for marker, begin, end in segments(data, at):
            if marker in FRAMES:
                components = set(data[begin + 10 : min(end, begin + 10 + 3 * data[begin + 9]) : 3])
            elif marker == START_OF_SCAN and end <= len(data):
                count = data[begin + 4]
                first, last, bits = data[end - 3 : end]
                if bits & 15 == 0:
                    for component in data[begin + 5 : begin + 5 + 2 * count : 2]:
                        final.setdefault(component, set()).update(range(first, min(last, 63) + 1))
                following = _MARKER_IN_SCAN.search(data, end)
                start = following.start() if following else None
    return bool(components) and all(len(final.get(component, ())) == 64 for component in components)
