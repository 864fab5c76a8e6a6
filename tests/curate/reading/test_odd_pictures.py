"""Pictures as people have them show what viewers show: clear colours, any metadata, any place of an orientation."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from curate.reading.images import ImageError, as_seen, decode_image, decode_scaled, image_size, pixel_hash
from curate.reading.png import MAX_TEXT_BYTES
from tests.curate.reading.made_images import chunk, encode, gradient, png


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "other"),
    [
        (16, 0, struct.pack(">2H", 1000, 30000), [1000], 116),
        (8, 0, bytes([3, 116]), [3], 116),
        (8, 0, bytes([3, 116]), [0x0103], 116),  # of which 8 bits count
        (4, 0, b"\x5a", [5], 170),
        (2, 0, b"\x60", [1], 170),
        (1, 0, b"\x80", [1], 0),
        (8, 2, bytes([1, 2, 3, 9, 9, 9]), [1, 2, 3], 9),
        (16, 2, struct.pack(">6H", 256, 512, 768, 2304, 2304, 2304), [256, 512, 768], 9),
    ],
)
def test_a_clear_colour_is_white_at_every_depth(depth, colour, row, key, other):
    transparent = (b"tRNS", struct.pack(f">{len(key)}H", *key))
    image = decode_image(png(2, 1, depth, colour, b"\0" + row, transparent))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (other,) * 3]


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def turned_by(orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def behind_the_pixels(data: bytes, kind: bytes, body: bytes) -> bytes:
    return data[:-12] + chunk(kind, body) + data[-12:]


def sideways() -> dict[str, bytes]:
    """One picture that is to be turned by a quarter, by all that may say so."""
    image = gradient()
    plain = encode(image, "PNG")
    profile = b"\nexif\n%8d\n" % len(turned_by()) + turned_by().hex().encode() + b"\n"
    in_xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
    packed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)
    files = {f"{kind} exif": encode(image, kind, exif=turned_by()) for kind in ("JPEG", "PNG", "WEBP")}
    files |= {f"{kind} xmp": encode(image, kind, xmp=XMP) for kind in ("JPEG", "WEBP")}
    for name, kind, body in (
        ("exif chunk", b"eXIf", turned_by()[6:]),
        ("exif in text", b"tEXt", b"Raw profile type exif\0" + profile),
        ("exif in packed text", b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        ("xmp", b"iTXt", in_xmp),
        ("packed xmp", b"iTXt", packed),
    ):
        files[f"PNG {name} behind"] = behind_the_pixels(plain, kind, body)
        files[f"PNG {name}"] = plain[:33] + chunk(kind, body) + plain[33:]
    files["JPEG exif before xmp"] = encode(image, "JPEG", exif=turned_by(), xmp=XMP.replace(b'"6"', b'"3"'))
    return files


@pytest.mark.parametrize("name", sideways())
def test_wherever_an_orientation_stands_sizes_and_pixels_are_upright(name):
    data = sideways()[name]
    image = decode_image(data)
    assert image_size(data) == image.size == (30, 40)
    upright = np.asarray(gradient().transpose(Image.Transpose.ROTATE_270), dtype=float)
    assert np.abs(np.asarray(image, dtype=float) - upright).mean() < 8
    assert as_seen(image).size == (30, 40)  # it is not turned twice
    assert as_seen(Image.open(io.BytesIO(data))).size == (30, 40)


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"tEXt", b"parameters\0" + b"masterpiece, " * 1_000_000),
        (b"zTXt", b"history\0\0" + zlib.compress(b"one more edit " * 1_000_000)),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<history/>" * 1_000_000)),
        (b"iTXt", b"workflow\0\0\0\0\0" + b"{}" * 1_000_000),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
        (b"iCCP", b"profile\0\7" + b"no known packing"),
        (b"zTXt", b"history\0\0no packed text"),
        (b"pHYs", b""),
        (b"eXIf", bytes(5_000_000)),
        (b"prVt", bytes(5_000_000)),
    ],
)
def test_metadata_of_any_kind_and_length_cost_no_pixels(kind, body, place):
    whole = encode(gradient(), "PNG")
    data = behind_the_pixels(whole, kind, body) if place == "behind" else whole[:33] + chunk(kind, body) + whole[33:]
    assert pixel_hash(decode_image(data)) == pixel_hash(gradient()) and image_size(data) == (40, 30)


def test_many_metadata_chunks_and_damaged_ones_cost_no_pixels():
    whole = encode(gradient(), "PNG")
    many = chunk(b"tEXt", b"a\0" + bytes(900_000)) * 80
    damaged = chunk(b"tEXt", b"a\0b")[:-1] + b"?"
    for inserted in (many, damaged):
        assert decode_image(whole[:33] + inserted + whole[33:]).size == (40, 30)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_marker_shows_what_it_shows_with_it(mode, options):
    whole = encode(gradient(83, 59).convert(mode), "JPEG", quality=90, **options)
    assert whole.endswith(b"\xff\xd9")
    for cut in (whole[:-2], whole[:-1], whole[:-2] + bytes(7)):
        assert pixel_hash(decode_image(cut)) == pixel_hash(decode_image(whole))
        assert decode_scaled(cut, 20).image.size == decode_scaled(whole, 20).image.size


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_that_lacks_pixels_is_cut_at_every_scale(options):
    rng = np.random.default_rng(0)
    whole = encode(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG", **options)
    start = whole.index(b"\xff\xda") + 20
    for end in [*rng.integers(start, len(whole) - 3, 40).tolist(), len(whole) - 4]:
        for at_least in (None, 8):
            with pytest.raises(ImageError, match="truncated"):
                decode_scaled(whole[:end], at_least)


def test_a_progressive_jpeg_that_ends_between_two_scans_is_cut():
    whole = encode(gradient(64, 64), "JPEG", progressive=True)
    scans = [at for at in range(len(whole)) if whole[at : at + 2] == b"\xff\xda"]
    tables = whole.rindex(b"\xff\xc4", 0, scans[-1])  # of the last scan
    for end in (scans[-1], tables):
        with pytest.raises(ImageError, match="truncated"):
            decode_image(whole[:end])


@pytest.mark.parametrize("name", [b"Comment", b"XML:com.adobe.xmp", b"Raw profile type exif"])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_text_that_unpacks_to_much_takes_no_memory_and_no_pixels(kind, name):
    packed = zlib.compress(bytes(400_000_000), 9)
    bomb = (kind, name + (b"\0\0" if kind == b"zTXt" else b"\0\1\0\0\0") + packed)
    tracemalloc.start()
    assert decode_image(png(1, 1, 8, 0, b"\0\0", bomb)).getpixel((0, 0)) == (0, 0, 0)
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_TEXT_BYTES
    tracemalloc.stop()
