"""The one place that reads images: bytes → what a viewer shows as RGB, RGB → arrays, and the hash of what is seen.

Image bytes come from anywhere, so they are refused by size before they are decoded, and every way in which
decoding can fail for what they hold ends in one exception, ``ImageError``, with a reason that can stand in a ledger.
Where the machine fails (no memory left), its own error goes through: it says nothing about the image.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from afresh.errors import of_the_machine, reason
from curate.reading import jpeg, png
from curate.reading.limits import pillows_limit_lifted

if TYPE_CHECKING:
    from numpy.typing import NDArray


MAX_PIXELS = 64_000_000
MAX_SCANS = 500  # of a progressive JPEG, each of which costs a pass over all its pixels; encoders write about ten
# Pillow's other readers are not needed for the contract's extensions, and some (EPS) start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# What a shard does not carry and Pillow turns into pixels without a program of its own.
CONVERTED_FORMATS = ("GIF", "BMP", "TIFF", "AVIF")
_ORIENTATION = 0x0112
# EXIF's numbers, by what brings such an image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SAYS_WHICH_WAY = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_BITS_PER_SAMPLE = 258
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\0\0\0\x0cjP  ", "jp2"),
    (b"\0\0\0\x0cJXL \r\n", "jxl"),
    (b"\xff\x0a", "jxl"),
)
_BMP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


class ImageError(ValueError):
    """An image that cannot be used; the message is the plain reason."""


@dataclass(frozen=True)
class DecodedImage:
    """An image as a viewer would see it.

    Attributes:
        image: 8-bit RGB, upright.
        width, height: of the image as it is stored, upright; ``image`` may be smaller.
        orientation: EXIF's number, 1 to 8, by EXIF or else by XMP, which ``image`` has applied.
    """

    image: Image.Image
    width: int
    height: int
    orientation: int

    @property
    def reduced(self) -> bool:
        """Whether ``image`` is smaller than what is stored."""
        return self.image.size != (self.width, self.height)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode image bytes to what a viewer would see, as 8-bit RGB.

    The orientation that EXIF or XMP states is applied, transparency is composited on white, 16-bit values are scaled,
    CMYK and palette images are converted, and of an animation the first frame is taken. Metadata of any length are
    passed over, and a JPEG that lacks nothing but its end marker is whole.

    Args:
        data: an encoded JPEG, PNG, WebP, GIF or BMP, whatever its file was called.
        max_pixels: refuse images with more pixels than this, before any pixel is decoded.

    Raises:
        ImageError: empty, unknown, truncated, malformed or too large.
        MemoryError: there is too little for an image of its size.
    """
    return decode_scaled(data, None, max_pixels=max_pixels).image


def decode_scaled(data: bytes, at_least: int | None, *, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """``decode_image``, at the smallest scale that leaves both sides ``at_least`` pixels.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size from the lowest frequencies of its blocks, which takes a fraction
    of the time; other formats have no such scale, and come whole.

    Args:
        data, max_pixels: as for ``decode_image``; ``max_pixels`` counts the stored pixels.
        at_least: sides that the image must have, as far as it is stored so large; None for the whole image.

    Raises:
        ImageError: as ``decode_image``.
    """
    with pillows_limit_lifted():
        return _decoded(data, at_least, max_pixels)


def _decoded(data: bytes, at_least: int | None, max_pixels: int) -> DecodedImage:
    image = _opened(data, max_pixels)
    width, height = image.size
    try:
        _load(image, at_least)
    except Exception as error:
        if of_the_machine(error):
            raise
        whole = None
        if image.format in ("JPEG", "MPO"):
            whole = jpeg.ended(data, partial(_pixels_of, max_pixels=max_pixels))
        if whole is None:
            raise ImageError(f"image cannot be decoded: {reason(error, at_most=200)}") from error
        image = _opened(whole, max_pixels)
        _load(image, at_least)
    try:
        orientation = _orientation(image)
        if orientation > 4:  # turned by a quarter
            width, height = height, width
        return DecodedImage(as_seen(image), width, height, orientation)
    except Exception as error:
        if of_the_machine(error):
            raise
        raise ImageError(f"image cannot be decoded: {reason(error, at_most=200)}") from error


def decode_opacity(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """How opaque each pixel of an image is, upright, as 8-bit grey: 255 everywhere where it has no transparency.

    Args:
        data, max_pixels: as for ``decode_image``.

    Raises:
        ImageError: as ``decode_image``.
    """
    with pillows_limit_lifted():
        image = _opened(data, max_pixels)
        if not image.has_transparency_data:
            width, height = image.size
            return Image.new("L", (height, width) if _orientation(image) > 4 else (width, height), 255)
        try:
            return _upright(image.convert("RGBA").getchannel("A"))
        except Exception as error:
            if of_the_machine(error):
                raise
            raise ImageError(f"image cannot be decoded: {reason(error, at_most=200)}") from error


def as_seen(image: Image.Image) -> Image.Image:
    """What a viewer shows of an image, as 8-bit RGB: upright, 16-bit values scaled, transparency on white."""
    image.load()  # an orientation may stand behind the pixels
    return _as_rgb(_upright(image))


def image_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height that ``decode_image`` gives, from the header alone: nothing is decoded.

    Raises:
        ImageError: empty, unknown, too large, or with a malformed header.
    """
    with pillows_limit_lifted():
        image = _opened(data, max_pixels)
    width, height = image.size
    return (height, width) if _orientation(image) > 4 else (width, height)


def _load(image: Image.Image, at_least: int | None) -> None:
    if at_least is not None:
        image.draft(None, (at_least, at_least))
    image.load()


def _pixels_of(data: bytes, max_pixels: int) -> object:
    """What is equal where the pixels of a JPEG are; nothing is equal to what cannot be decoded."""
    try:
        return hashlib.sha256(_opened(data, max_pixels).tobytes()).digest()
    except Exception as error:  # the readers raise whatever the malformed bytes lead them to
        if of_the_machine(error):
            raise
        return object()


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """An image of which the header is read, and found to be of a size to decode."""
    if not data:
        raise ImageError("image is empty (0 bytes)")
    if (scans := jpeg.count_scans(data)) > MAX_SCANS:
        raise ImageError(f"JPEG has {scans} scans, more than {MAX_SCANS}: refused before decoding")
    is_png = data.startswith(png.SIGNATURE)
    try:
        image = Image.open(io.BytesIO(png.pixels_alone(data) if is_png else data), formats=FORMATS)
        if is_png:
            image.info |= png.orientation_data(data)
    except Image.UnidentifiedImageError as error:
        known = image_format(data[:64])
        other = "" if known is None else f": its first bytes are those of {known}"
        raise ImageError(f"not a {', '.join(FORMATS)} image{other}") from error
    except Exception as error:  # the readers raise whatever the malformed bytes lead them to
        if of_the_machine(error):
            raise
        raise ImageError(f"image header is malformed: {reason(error, at_most=200)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"image is {width}x{height}, more than {max_pixels} pixels: refused before decoding")
    if width < 1 or height < 1:
        raise ImageError(f"image is {width}x{height}: nothing to see")
    return image


def shrunk(image: Image.Image, at_least: int) -> Image.Image:
    """An image reduced by a whole factor, the mean of each block, as far as both sides keep ``at_least`` pixels."""
    factor = min(image.size) // at_least
    return image.reduce(factor) if factor > 1 else image


def image_array(
    image: Image.Image, size: int | tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> NDArray[np.float32]:
    """One image brought to a size: float32 [3, height, width] in [0, 1].

    Args:
        image: of any mode.
        size: side of the square that it is squashed to, or (width, height).
        resample: PIL's filter, antialiased.
    """
    if isinstance(size, int):
        size = (size, size)
    return _pixels(image, size, resample).astype(np.float32).transpose(2, 0, 1) / np.float32(255.0)


def stack_images(images: Sequence[Image.Image], size: int) -> NDArray[np.float32]:
    """Images squashed to squares: float32 [n, 3, size, size] in [0, 1]; n may be 0."""
    pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for row, image in enumerate(images):
        pixels[row] = _pixels(image, (size, size), Image.Resampling.BICUBIC)
    stack = np.empty((len(images), 3, size, size), dtype=np.float32)
    return np.divide(pixels.transpose(0, 3, 1, 2), np.float32(255.0), out=stack)


def _pixels(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> NDArray[np.uint8]:
    if image.mode != "RGB":
        image = _as_rgb(image)
    if image.size != size:
        image = image.resize(size, resample)
    return np.asarray(image)


def is_lossless(data: bytes) -> bool:
    """Whether encoded bytes keep every pixel as it was stored: PNG, GIF, BMP and lossless WebP; not JPEG."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        start = 12
        while (kind := data[start : start + 4]) not in (b"VP8L", b"VP8 ", b""):
            # An extended file has other chunks before its pixels; an animation's frame has them within, after 16 bytes.
            size = 16 if kind == b"ANMF" else int.from_bytes(data[start + 4 : start + 8], "little")
            start += 8 + size + size % 2
        return kind == b"VP8L"
    return data.startswith((b"\x89PNG", b"GIF8", b"BM"))


def image_format(head: bytes) -> str | None:
    """The format that encoded bytes begin with, by their magic numbers: the first 64 bytes are enough.

    Returns:
        ``jpg``, ``png``, ``webp``, ``gif``, ``bmp``, ``tiff``, ``avif``, ``heic``, ``jp2`` or ``jxl``; None for
        anything else.
    """
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:2] == b"BM" and head[6:10] == bytes(4) and head[14:18] in _BMP_HEADERS:  # two letters are not enough
        return "bmp"
    if head[4:8] == b"ftyp":
        return "avif" if head[8:12] in (b"avif", b"avis") else "heic" if head[8:12] in _HEIC_BRANDS else None
    return None


def to_png(data: bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """An image of another format as PNG, its pixels unchanged; of an animation the first frame.

    Args:
        data: an encoded GIF, BMP, TIFF or AVIF (which Pillow decodes to 8 bits a channel).
        max_pixels: refuse images with more pixels than this, before any pixel is decoded.

    Raises:
        ImageError: it cannot be decoded, is too large, or has colours or a depth that PNG cannot hold unchanged.
    """
    with pillows_limit_lifted():
        return _as_png(data, max_pixels)


def _as_png(data: bytes, max_pixels: int) -> bytes:
    try:
        opened = Image.open(io.BytesIO(data), formats=CONVERTED_FORMATS)
        if opened.width * opened.height > max_pixels:
            raise ImageError(f"image is {opened.width}x{opened.height}, more than {max_pixels} pixels")
        bits = opened.tag_v2.get(_BITS_PER_SAMPLE, (1,)) if isinstance(opened, TiffImageFile) else (8,)
        opened.load()
        image = _upright(opened)
        if image.mode == "PA":
            image = image.convert("RGBA")
        if image.mode == "I":  # 32 bits, of which PNG has 16
            grey = np.asarray(image)
            if grey.min() >= 0 and grey.max() <= 65535:
                image = Image.fromarray(grey.astype(np.uint16))
        if image.mode not in _PNG_MODES or (max(bits) > 8 and image.mode != "I;16"):
            raise ImageError(f"PNG cannot hold its pixels unchanged ({image.mode}, {max(bits)} bits a channel)")
        return _encoded_png(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"not a {', '.join(CONVERTED_FORMATS)} image") from error
    except Exception as error:  # the readers raise whatever the malformed bytes lead them to
        if of_the_machine(error):
            raise
        raise ImageError(f"image cannot be decoded: {reason(error, at_most=200)}") from error


def array_to_png(values: object) -> bytes:
    """PNG of an array or nested lists of integers from 0 to 255: [h, w], or [h, w, 1, 3 or 4].

    Raises:
        ImageError: other shapes or values.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ImageError("rows of unequal length are no array") from error
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype.kind not in "iu" or array.size == 0 or array.min() < 0 or array.max() > 255:
        raise ImageError(f"array of shape {array.shape} and type {array.dtype} where integers from 0 to 255 belong")
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageError(f"array of shape {array.shape} where [h, w] or [h, w, 1, 3 or 4] belongs")
    return _encoded_png(Image.fromarray(array.astype(np.uint8)))


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 (hex) of the size and the RGB pixels: equal for images that are seen as equal."""
    if image.mode != "RGB":
        image = _as_rgb(image)
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def coded_hash(data: bytes, orientation: int = 1) -> str | None:
    """SHA-256 (hex) of what a JPEG's pixels come from: its tables, frame and scans, without its metadata.

    Equal only for images with equal pixels. Unlike ``pixel_hash`` it needs no decoding, and misses what was coded anew
    without loss (other Huffman tables, progressive for sequential) or stored in another format.

    Args:
        data: an encoded image that can be decoded.
        orientation: EXIF's number, which is part of what is seen.

    Returns:
        None for other formats.
    """
    digest = hashlib.sha256(f"orientation {orientation}".encode())
    jfif = colours_told = False
    for marker, start, end in jpeg.segments(data):
        if marker == jpeg.START_OF_SCAN:
            # Where the colours are not plain YCbCr by their numbers, decoders ask whether the file says it is JFIF.
            digest.update(b"JFIF" if jfif and colours_told else b"")
            digest.update(memoryview(data)[start:])
            return digest.hexdigest()
        segment = data[start:end]
        jfif = jfif or (marker == jpeg.APP0 and segment[4:9] == b"JFIF\0")
        other_numbers = marker in jpeg.FRAMES and segment[10::3][:3] != b"\1\2\3"
        colours_told = colours_told or marker == jpeg.ADOBE or other_numbers
        if marker == jpeg.ADOBE or marker not in jpeg.METADATA:
            digest.update(segment)
    return None


def _orientation(image: Image.Image) -> int:
    """EXIF's number by which an image is to be brought upright; of an image that was loaded upright 1."""
    try:
        # Not a PNG's own way, which decodes all pixels to look behind them.
        orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception as error:  # malformed EXIF says nothing about the pixels
        if of_the_machine(error):
            raise
        return 1
    return int(orientation) if orientation in range(2, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    if orientation == 1:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    for name in _SAYS_WHICH_WAY:  # it would be turned again by whoever reads that
        turned.info.pop(name, None)
    return turned


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255 instead of scaling
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        shown = grey // 257
        if isinstance(clear := image.info.get("transparency"), int):
            shown[grey == clear] = 255
        return Image.fromarray(shown.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _encoded_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
