"""Images of any common make are decoded to what a viewer sees, and hostile ones end in a plain reason."""

from __future__ import annotations

import contextlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from curate.reading import images as images_module
from curate.reading.images import (
    ImageError,
    coded_hash,
    decode_image,
    decode_scaled,
    image_array,
    is_lossless,
    pixel_hash,
    shrunk,
    stack_images,
)
from tests.curate.reading.made_images import chunk, encode, gradient, png


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_common_formats_become_rgb_of_their_size(kind):
    image = decode_image(encode(gradient(), kind))
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_transparency_is_seen_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert decode_image(encode(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encode(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255] * 256)
    assert decode_image(encode(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encode(Image.new("LA", (4, 4), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))
    assert decode_image(encode(grey, "PNG")).getpixel((0, 0)) == (128, 128, 128)


def test_sixteen_bit_colour_and_alpha_are_scaled_not_clipped():
    value = struct.pack(">H", 128 * 257)
    assert decode_image(png(1, 1, 16, 2, b"\0" + value * 3)).getpixel((0, 0)) == (128, 128, 128)
    clear = b"\0" + value * 3 + struct.pack(">H", 0)
    assert decode_image(png(1, 1, 16, 6, clear)).getpixel((0, 0)) == (255, 255, 255)
    grey_alpha = b"\0" + value + struct.pack(">H", 65535)
    assert decode_image(png(1, 1, 16, 4, grey_alpha)).getpixel((0, 0)) == (128, 128, 128)


def test_palettes_and_single_bits_become_colours():
    palette = (b"PLTE", bytes([10, 20, 30, 200, 100, 50]))
    assert decode_image(png(2, 1, 1, 3, b"\0\x40", palette)).getpixel((0, 0)) == (10, 20, 30)
    assert decode_image(png(2, 1, 1, 3, b"\0\x40", palette)).getpixel((1, 0)) == (200, 100, 50)
    half_clear = (b"tRNS", bytes([255, 0]))  # by palette entry
    assert decode_image(png(2, 1, 1, 3, b"\0\x40", palette, half_clear)).getpixel((1, 0)) == (255, 255, 255)
    assert decode_image(png(2, 1, 1, 0, b"\0\x40")).getpixel((1, 0)) == (255, 255, 255)
    keyed = (b"tRNS", struct.pack(">H", 0))  # black is clear
    assert decode_image(png(2, 1, 1, 0, b"\0\x40", keyed)).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_is_converted():
    image = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = image.getpixel((0, 0))
    assert red > 200 and green < 60 and blue < 60


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encode(gradient(), "JPEG", exif=exif, quality=95))
    assert turned.size == (30, 40)
    upright = np.asarray(gradient().transpose(Image.Transpose.ROTATE_270), dtype=float)
    assert np.abs(np.asarray(turned, dtype=float) - upright).mean() < 5


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        red, _, blue = decode_image(data).getpixel((4, 4))
        assert red > 200 and blue < 60


def huge_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(9000, 9000), (12000, 12000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_absurd_sizes_are_refused_before_decoding(size, recwarn):
    with pytest.raises(ImageError, match="refused before decoding"):
        decode_image(huge_png(*size))
    assert not [warning for warning in recwarn if "bomb" in str(warning.message)]


def huge_header(kind: str) -> bytes:
    """A small file of each format whose header gives 60,000 pixels a side."""
    data = bytearray(encode(gradient(), kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", 60_000, 60_000)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", 60_000, 60_000)
    elif kind == "WEBP":  # an extended header, whose canvas is larger than its image
        size = (16_000 - 1).to_bytes(3, "little")
        data[12:12] = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size * 2
        data[4:8] = struct.pack("<I", len(data) - 8)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "WEBP"])
def test_no_format_gets_memory_for_what_only_its_header_says(kind):
    with pytest.raises(ImageError):
        decode_scaled(huge_header(kind), 128)
    with pytest.raises(ImageError):
        decode_image(huge_header(kind))


def test_a_jpeg_of_endless_scans_is_refused_before_decoding(monkeypatch):
    progressive = encode(gradient(400, 400), "JPEG", progressive=True)
    scans = progressive.count(b"\xff\xda")
    assert 5 < scans < images_module.MAX_SCANS / 10
    last = progressive[progressive.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="scans, more than 500"):
        decode_image(progressive[:-2] + last * 500 + progressive[-2:])
    assert decode_image(progressive).size == (400, 400)


def test_scans_are_counted_where_a_decoder_may_look_for_more_than_one(monkeypatch):
    monkeypatch.setattr(images_module, "MAX_SCANS", 5)
    plain = encode(gradient(400, 400), "JPEG")
    assert decode_image(plain + b"\xff\xda" * 10).size == (400, 400)  # what follows the image is no scan of it
    scan = plain.index(b"\xff\xda")
    alone = plain[: scan + 2] + b"\0\x08\1\1\0\0\x3f\0"  # the first component of three
    with pytest.raises(ImageError, match="10 scans"):
        decode_image(alone + b"\xff\xda" * 9)


def test_a_plain_jpeg_inside_comments_does_not_hide_the_scans_of_another(monkeypatch):
    monkeypatch.setattr(images_module, "MAX_SCANS", 5)
    plain, progressive = (encode(gradient(400, 400), "JPEG", progressive=progressive) for progressive in (False, True))
    # A restart marker has no length. Read as one that has, it leads into the first comment, and that into the second.
    marker, second = b"\xff\xd0", bytes(250) + plain[2:]
    first = b"\xff\xfe\xff\xff" + bytes(65530) + b"\xff\xfe\0"
    second = b"\xff\xfe" + (len(second) + 2).to_bytes(2, "big") + second
    with pytest.raises(ImageError, match="scans"):
        decode_image(progressive[:2] + marker + first + second + progressive[2:])


def test_the_pixel_limit_is_an_argument():
    with pytest.raises(ImageError, match="40x30, more than 1199 pixels"):
        decode_image(encode(gradient(), "PNG"), max_pixels=1199)
    assert decode_image(encode(gradient(), "PNG"), max_pixels=1200).size == (40, 30)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"words",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        b"\x89PNG\r\n\x1a\n",
        encode(gradient(), "PNG")[:100],
        encode(gradient(), "JPEG")[:400],
        encode(gradient(), "WEBP", lossless=True)[:60],
        b"RIFF\x10\x00\x00\x00WEBPVP8 ",
    ],
)
def test_what_is_no_whole_image_ends_in_one_plain_reason(data):
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value) and str(caught.value)


def test_every_flipped_byte_gives_an_image_or_an_image_error():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = bytearray(encode(gradient(), kind))
        for position in rng.integers(0, len(whole), 60):
            broken = bytearray(whole)
            broken[position] ^= 0xFF
            with contextlib.suppress(ImageError):
                assert decode_image(bytes(broken), max_pixels=1_000_000).mode == "RGB"


def test_arrays_are_squashed_squares_in_zero_to_one():
    array = image_array(gradient(), 16)
    assert (array.shape, array.dtype) == ((3, 16, 16), np.float32)
    assert array.min() >= 0.0 and array.max() <= 1.0
    white = image_array(Image.new("RGB", (5, 9), "white"), 4)
    assert np.all(white == 1.0)
    assert (
        array[0, 0, 0] < array[0, 0, -1] and array[1, 0, 0] < array[1, -1, 0]
    )  # x runs along width, y along height


def test_a_stack_holds_the_arrays_of_its_images():
    images = [gradient(), Image.new("L", (7, 7), 50)]
    stack = stack_images(images, 8)
    assert stack.shape == (2, 3, 8, 8)
    assert np.array_equal(stack[1], image_array(images[1], 8))
    assert stack_images([], 8).shape == (0, 3, 8, 8)


def test_the_pixel_hash_sees_pixels_not_bytes():
    image = gradient()
    lossless = [decode_image(encode(image, "PNG")), decode_image(encode(image, "WEBP", lossless=True))]
    assert pixel_hash(lossless[0]) == pixel_hash(lossless[1]) == pixel_hash(image)
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert pixel_hash(changed) != pixel_hash(image)
    assert pixel_hash(Image.new("RGB", (2, 8))) != pixel_hash(Image.new("RGB", (8, 2)))


@pytest.mark.parametrize(
    ("at_least", "size"), [(None, (640, 400)), (400, (640, 400)), (150, (320, 200)), (40, (80, 50))]
)
def test_a_jpeg_is_decoded_no_larger_than_needed(at_least, size):
    decoded = decode_scaled(encode(gradient(640, 400), "JPEG"), at_least)
    assert decoded.image.size == size and (decoded.width, decoded.height) == (640, 400)
    assert decoded.reduced == (size != (640, 400))
    whole = np.asarray(gradient(640, 400).resize(size, Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(decoded.image, dtype=float) - whole).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_formats_come_whole(kind):
    decoded = decode_scaled(encode(gradient(640, 400), kind), 40)
    assert decoded.image.size == (640, 400) and not decoded.reduced


def test_an_image_is_shrunk_by_a_whole_factor_and_never_below_what_is_needed():
    for size, at_least, expected in (
        ((640, 400), 100, (160, 100)),
        ((640, 401), 100, (160, 101)),
        ((640, 400), 201, (640, 400)),
        ((50, 900), 100, (50, 900)),
    ):
        image = gradient(*size)
        assert shrunk(image, at_least).size == expected
        assert np.abs(np.asarray(shrunk(image, at_least), float).mean() - np.asarray(image, float).mean()) < 1


@pytest.mark.parametrize("orientation", range(10))
def test_a_reduced_image_is_upright_and_its_size_that_of_the_upright_whole(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(gradient(640, 400), "JPEG", exif=exif, quality=95)
    whole, reduced = decode_image(data), decode_scaled(data, 100)
    assert (reduced.width, reduced.height) == whole.size == ((400, 640) if orientation in (5, 6, 7, 8) else (640, 400))
    assert min(reduced.image.size) == 100 and reduced.reduced
    small = np.asarray(whole.resize(reduced.image.size, Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(reduced.image, dtype=float) - small).mean() < 3


def test_modes_and_damage_are_the_same_at_every_scale():
    for mode in ("L", "CMYK"):
        data = encode(gradient(640, 400).convert(mode), "JPEG")
        assert decode_scaled(data, 40).image.mode == "RGB"
        difference = np.asarray(decode_scaled(data, 40).image, float) - np.asarray(decode_image(data).reduce(8), float)
        assert np.abs(difference).mean() < 4
    data = encode(gradient(640, 400), "JPEG")
    with pytest.raises(ImageError, match="truncated"):
        decode_scaled(data[: len(data) // 2], 40)
    with pytest.raises(ImageError, match="refused before decoding"):
        decode_scaled(data, 40, max_pixels=640 * 400 - 1)


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def test_the_coded_hash_sees_what_a_jpeg_is_decoded_from_and_not_its_metadata():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    plain = encode(image, "JPEG")
    exif = Image.Exif()
    exif[0x010E] = "a description"
    for metadata in ({"exif": exif}, {"icc_profile": bytes(3000)}, {"comment": b"words"}, {"dpi": (300, 300)}):
        assert coded_hash(encode(image, "JPEG", **metadata)) == coded_hash(plain)
    jfif = plain[2:20]
    assert jfif[4:8] == b"JFIF" and coded_hash(plain.replace(jfif, b"")) == coded_hash(plain)
    assert coded_hash(plain, 6) != coded_hash(plain)
    changed = image.copy()
    changed.putpixel((9, 9), (0, 255, 0))
    assert coded_hash(encode(changed, "JPEG")) != coded_hash(plain)
    assert coded_hash(encode(image, "JPEG", quality=74)) != coded_hash(plain)
    assert coded_hash(encode(image, "PNG")) is None and coded_hash(b"") is None and coded_hash(plain[:30]) is None


def test_what_turns_the_colours_of_a_jpeg_is_part_of_its_coded_hash():
    image = gradient(64, 64)
    plain = encode(image, "JPEG")
    adobe = {turn: plain[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([turn])) + plain[20:] for turn in (0, 1)}
    with_jfif = {turn: plain[:20] + data[2:] for turn, data in adobe.items()}
    files = [*adobe.values(), *with_jfif.values(), plain]
    for one in files:
        for other in files:
            if coded_hash(one) == coded_hash(other):
                assert pixel_hash(decode_image(one)) == pixel_hash(decode_image(other))
    assert pixel_hash(decode_image(adobe[0])) != pixel_hash(decode_image(adobe[1]))
    assert pixel_hash(decode_image(adobe[0])) != pixel_hash(decode_image(with_jfif[0]))  # JFIF overrules Adobe


def test_equal_coded_hashes_mean_equal_pixels_whatever_byte_is_changed():
    whole = encode(gradient(64, 48), "JPEG", quality=60)
    expected, seen = coded_hash(whole), pixel_hash(decode_image(whole))
    rng = np.random.default_rng(0)
    for place in [*range(2, 700), *rng.integers(0, len(whole), 200).tolist()]:
        broken = bytearray(whole)
        broken[place % len(whole)] ^= int(rng.integers(1, 256))
        with contextlib.suppress(ImageError):
            decoded = decode_scaled(bytes(broken), None, max_pixels=1_000_000)
            if coded_hash(bytes(broken), decoded.orientation) == expected:
                assert pixel_hash(decoded.image) == seen, place


def test_lossless_is_told_from_lossy_by_the_bytes():
    image = gradient()
    assert all(is_lossless(encode(image, kind)) for kind in ("PNG", "GIF", "BMP"))
    assert is_lossless(encode(image, "WEBP", lossless=True))
    assert is_lossless(encode(image, "WEBP", lossless=True, icc_profile=bytes(9001)))  # an extended file
    frames = {"save_all": True, "append_images": [image.rotate(90)]}
    assert is_lossless(encode(image, "WEBP", lossless=True, **frames))
    assert not is_lossless(encode(image, "WEBP", quality=50, **frames))
    assert not is_lossless(encode(image, "WEBP", quality=100))
    assert not is_lossless(encode(image, "WEBP", quality=100, icc_profile=b"VP8L" * 9))
    assert not is_lossless(encode(image, "JPEG"))
