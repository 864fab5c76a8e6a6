"""Images of any common make are decoded to what a viewer sees, and hostile ones end in a plain reason."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from curate.images import ImageError, decode_image, image_array, is_lossless, pixel_hash, stack_images


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


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
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

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
