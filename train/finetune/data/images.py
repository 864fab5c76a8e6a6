"""Images by position of the stream: read where they lie in their shards, and replaced where they are bad.

What stands at a position follows from ``train.finetune.data.order``. Images are read one by one from where the scan
found them, so that neither memory nor the bytes read grow with the number of workers. A sample that cannot be read as
the scan saw it (its shard is gone, cut or changed, or its image cannot be decoded) is replaced by another one, chosen
by position, so that batches keep their shape; each such fault is recorded. A stream, as webdataset's pipelines are,
would begin at the start of a shard again when a run is resumed.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from afresh.errors import NOTHING_LEFT, UserError, reason
from curate.reading.images import ImageError, decode_opacity, decode_scaled
from curate.reading.samples import Sample, read_samples
from train.finetune.config import Augmentation
from train.finetune.data.augment import augment, draw
from train.finetune.data.buckets import Crop, Size, bring_to, crop_box, fitting_bucket, nearest_bucket
from train.finetune.data.order import SampleOrder, derive_seed, generator
from train.finetune.data.scan import ShardSet

T = TypeVar("T")
OPEN_FILES = 64
PROBES = 64  # samples that are tried before all are given up
ATTEMPTS = 4  # to reach a remote store
DETAIL_TO_SPARE = 2  # a JPEG is decoded at a scale that leaves this many times the wanted size


class SampleError(Exception):
    """A sample that cannot be used; the message says why."""


@dataclass(frozen=True)
class Fault:
    """A sample that could not be used where its turn was.

    Attributes:
        position: of the stream.
        shard, key: the sample.
        reason: why.
        instead: ``shard/key`` of the one that stands in for it; None if the place was left empty, with weight 0.
    """

    position: int
    shard: str
    key: str
    reason: str
    instead: str | None


class ImageReader:
    """Encoded images by row.

    Args:
        shard_set: where they lie.
        keep: compressed shards, which have to be read whole, that are held in memory.
    """

    def __init__(self, shard_set: ShardSet, keep: int = 1) -> None:
        self.shard_set, self.keep = shard_set, keep
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._whole: OrderedDict[int, dict[str, bytes]] = OrderedDict()

    def read(self, row: int) -> bytes:
        """The image of a row, as it was when the shard was scanned.

        Raises:
            SampleError: it is not there any more, or is another one.
            UserError: a remote store cannot be reached, or the machine has no files or memory left.
        """
        shard, place = self.shard_set.locate(row)
        url, batch = self.shard_set.urls[shard], self.shard_set.shard(shard)
        offset, size, crc32 = (batch.column(name)[place].as_py() for name in ("offset", "bytes", "crc32"))
        try:
            if offset < 0:
                data = self._compressed(shard).get(batch.column("key")[place].as_py(), b"")
            elif "://" in url:
                data = _read_range(url, offset, size)
            else:
                file = self._file(shard)
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            if error.errno in NOTHING_LEFT:
                raise UserError(f"{url}: {reason(error)}; the same command goes on from here") from error
            raise SampleError(f"{url}: {reason(error)}") from error
        if len(data) < size:
            raise SampleError(f"{url}: the shard was cut after it was scanned")
        if zlib.crc32(data) != crc32:
            raise SampleError(f"{url}: the shard changed after it was scanned")
        return data

    def _file(self, shard: int) -> IO[bytes]:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = open(self.shard_set.urls[shard], "rb")  # noqa: SIM115  # kept open
        self._files.move_to_end(shard)
        return self._files[shard]

    def _compressed(self, shard: int) -> dict[str, bytes]:
        if shard not in self._whole:
            while len(self._whole) >= max(self.keep, 1):
                self._whole.popitem(last=False)
            try:
                samples = list(read_samples(self.shard_set.urls[shard]))
            except UserError as error:
                raise SampleError(str(error)) from error
            self._whole[shard] = {item.key: item.image for item in samples if isinstance(item, Sample)}
        return self._whole[shard]

    def __getstate__(self) -> dict[str, Any]:
        """Without open files."""
        return vars(self) | {"_files": OrderedDict(), "_whole": OrderedDict()}


def _read_range(url: str, offset: int, size: int) -> bytes:
    import fsspec

    for attempt in range(ATTEMPTS):
        try:
            filesystem, path = fsspec.core.url_to_fs(url)
            return filesystem.cat_file(path, start=offset, end=offset + size)
        except FileNotFoundError:
            raise
        except Exception as error:  # fsspec's file systems raise their own kinds
            if attempt + 1 == ATTEMPTS:
                raise UserError(f"cannot read shard {url}: {error}; the same command goes on from here") from error
            time.sleep(0.5 * 4**attempt)
    raise AssertionError("unreachable")


class ImageLoader:
    """Images by row, decoded, brought to the size of their bucket and augmented.

    Args:
        shard_set: where they lie.
        sizes: of the buckets, or the one size of all.
        crop: how an image comes to its size.
        how: random changes.
        seed: of crops and changes.
        keep: see :class:`ImageReader`.
        enlarge: let small images grow to their bucket.
        masked: give the opacity of each pixel as a fourth channel.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        sizes: Sequence[Size],
        crop: Crop,
        how: Augmentation,
        seed: int,
        keep: int = 1,
        *,
        enlarge: bool = True,
        masked: bool = False,
    ) -> None:
        self.enlarge, self.masked = enlarge, masked
        self.shard_set, self.sizes, self.crop, self.how, self.seed = shard_set, list(sizes), crop, how, seed
        self.reader = ImageReader(shard_set, keep)

    @property
    def varies(self) -> bool:
        """Whether an image looks different from visit to visit."""
        return self.crop == "random" or self.how.active

    def buckets(self, shard: int) -> NDArray[np.uint16]:
        """The bucket of each sample of a shard."""
        width, height = (self.shard_set.column(shard, name) for name in ("width", "height"))
        return (nearest_bucket if self.enlarge else fitting_bucket)(width, height, self.sizes)

    def size(self, row: int) -> Size:
        """The size that the image of a row is brought to."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        shard, place = self.shard_set.locate(row)
        return self.sizes[self.buckets(shard)[place]]

    def load(self, row: int, visit: int) -> NDArray[np.uint8]:
        """Pixels ``[3, height, width]`` at a visit, where masked ``[4, height, width]``.

        Raises:
            SampleError: the image cannot be read or decoded.
            UserError: a remote store cannot be reached.
        """
        return self.decode(row, visit, self.reader.read(row))

    def decode(self, row: int, visit: int, data: bytes) -> NDArray[np.uint8]:
        """The same for encoded bytes that were read before. Raises ``SampleError`` if they cannot be decoded."""
        size = self.size(row)
        if self.how.variants:
            visit %= self.how.variants
        try:
            image = decode_scaled(data, DETAIL_TO_SPARE * max(size), max_pixels=self.shard_set.max_pixels).image
            opaque = decode_opacity(data, max_pixels=self.shard_set.max_pixels) if self.masked else None
        except ImageError as error:
            raise SampleError(str(error)) from error
        place = self._place(row, visit)
        pixels = bring_to(image, size, crop_box(image.size, size, self.crop, place))
        if opaque is not None:
            mask = bring_to(opaque.convert("RGB"), size, crop_box(opaque.size, size, self.crop, place))
            return np.concatenate([self._changed(pixels, row, visit), self._changed(mask, row, visit, moved=True)[:1]])
        return self._changed(pixels, row, visit)

    def _changed(self, pixels: NDArray[np.uint8], row: int, visit: int, moved: bool = False) -> NDArray[np.uint8]:
        """Pixels ``[3, height, width]`` with the changes of a visit, or only the movements among them."""
        how = replace(self.how, colour=0.0, hue=0.0) if moved else self.how
        if not how.active:
            return pixels
        uniform = self._changes(row, visit)
        changed = augment(torch.from_numpy(pixels)[None].float() / 255, uniform, how)[0]
        return (changed * 255).round().to(torch.uint8).numpy()

    def frame(self, row: int, visit: int) -> tuple[int, int, int, int, int, int]:
        """What part of its original an image is at a visit, in pixels: height and width of the original; top and left
        of the crop, in the original brought to the scale of the crop; height and width of the crop.

        A flip counts as one of the original. An image that is squashed is cropped nowhere.
        """
        shard, place = self.shard_set.locate(row)
        original = int(self.shard_set.column(shard, "width")[place]), int(self.shard_set.column(shard, "height")[place])
        width, height = size = self.size(row)
        if self.how.variants:
            visit %= self.how.variants
        left, top, right, bottom = crop_box(original, size, self.crop, self._place(row, visit))
        if self.how.flip and float(self._changes(row, visit)[0, 1]) < self.how.flip:
            left, right = original[0] - right, original[0] - left
        at = round(top * height / (bottom - top)), round(left * width / (right - left))
        return original[1], original[0], *at, height, width

    # By the sample's identity and not its row, which is another when shards are added: caches are shared.

    def _place(self, row: int, visit: int) -> list[float]:
        """Where a random crop lies, see :func:`crop_box`."""
        if self.crop != "random":
            return [0.5, 0.5]
        return torch.rand(2, generator=generator(self.seed, "crop", *self.shard_set.identity(row), visit)).tolist()

    def _changes(self, row: int, visit: int) -> torch.Tensor:
        """``[1, 9]``, see :func:`augment`."""
        return draw([generator(self.seed, "augment", *self.shard_set.identity(row), visit)])


@dataclass
class Found(Generic[T]):
    """What stands at a position.

    Attributes:
        row: the sample's.
        visit: how often it was seen before.
        value: what was loaded; None if nothing could be.
        faults: of those that were tried and are bad.
    """

    row: int
    visit: int
    value: T | None
    faults: list[Fault]


def find_sample(
    order: SampleOrder, position: int, load: Callable[[int, int], T], identity: Callable[[int], tuple[str, str]]
) -> Found[T]:
    """The sample at a position, or where it cannot be loaded the first of its substitutes that can.

    Args:
        order: which sample stands where.
        position: of the stream.
        load: ``(row, visit)`` → what is wanted of a sample; raises ``SampleError`` for a bad one.
        identity: row → ``(shard, key)``.
    """
    row, visit = order.at(position)
    try:
        return Found(row, visit, load(row, visit), [])
    except SampleError as error:
        bad = [(row, str(error))]
    instead: Found[T] = Found(row, visit, None, [])
    for other, other_visit in order.substitutes(position):
        try:
            instead = Found(other, other_visit, load(other, other_visit), [])
            break
        except SampleError as error:
            bad.append((other, str(error)))
    name = None if instead.value is None else "/".join(identity(instead.row))
    # Those that were tried in vain as substitutes have positions of their own, where they are recorded.
    instead.faults.append(Fault(position, *identity(row), bad[0][1], name))
    return instead


def find_batch(
    order: SampleOrder,
    positions: Sequence[int],
    load: Callable[[int, int], T],
    identity: Callable[[int], tuple[str, str]],
) -> list[Found[T]]:
    """:func:`find_sample` for each position of a batch.

    Raises:
        UserError: nothing was found, and it seems that no sample at all can be read any more.
    """
    found = [find_sample(order, position, load, identity) for position in positions]
    if all(one.value is None for one in found):
        some = np.random.default_rng(derive_seed(order.seed, "probe", positions[0])).integers(order.rows, size=PROBES)
        for row in some.tolist():
            with contextlib.suppress(SampleError):
                load(row, 0)
                return found  # a bucket of a few samples has lost them all: its batch has weight 0
        fault = found[0].faults[0]
        raise UserError(
            f"{fault.shard}/{fault.key}: {fault.reason}; other samples cannot be read either: "
            "bring the shards back, and the same command goes on"
        )
    return found

