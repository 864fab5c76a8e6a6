"""Images of single samples, by the identity that a ledger gives them, from wherever they still lie."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from PIL import Image

from afresh.errors import UserError
from afresh.storage import Store
from curate.reading.images import MAX_PIXELS, ImageError, decode_image
from curate.reading.samples import Sample, read_samples
from curate.reading.urls import expand_shards, find_shards, open_shard
from curate.results.ledger import DROPPED, KEPT, UNREADABLE, read_ledger
from curate.results.report_data import Pictures as Thumbnails
from curate.results.report_page import read_summary

HELD_SHARDS, HELD_IMAGES = 64, 512


class Pictures:
    """Images of a curation's samples. What is asked for is read; what was read is remembered, up to a bound.

    An image comes from the shards that were curated, where they are given; else a kept one from the curation's own
    shards, and any that the report shows from there, small.

    Args:
        out: folder that ``curate dedup`` wrote.
        shards: what was curated.

    Attributes:
        rows: number in the ledger of each readable sample, by its shard and key.

    Raises:
        UserError: ``out`` is no finished curation.
        UsageError: a name in the ledger means several of the shards.
    """

    def __init__(self, out: str, shards: Sequence[str] = ()) -> None:
        self.out, self.place = out, Store(out)
        settings = read_summary(out)["settings"]
        self.per_shard, self.max_pixels = settings["samples_per_shard"], max(MAX_PIXELS, settings["max_pixels"])
        columns = read_ledger(out, ["shard", "key", "status"]).to_pydict()
        readable = [row for row, status in enumerate(columns["status"]) if status != UNREADABLE]
        self.rows = {(columns["shard"][row], columns["key"][row]): row for row in readable}
        self._written: dict[int, tuple[str, int]] = {}
        for status, folder in ((KEPT, "shards"), (DROPPED, "dropped" if settings["write_dropped"] else "")):
            written = [row for row in readable if columns["status"][row] == status] if folder else []
            self._written |= {row: (folder, rank) for rank, row in enumerate(written)}  # they are written in this order
        urls = expand_shards(shards) if shards else []
        self._input = {name: urls[at] for name, at in find_shards(set(columns["shard"]), urls, out).items()}
        self._places: OrderedDict[str, list[tuple[str, int, int]]] = OrderedDict()
        self._images: OrderedDict[tuple[str, str], Image.Image | None] = OrderedDict()
        self._thumbnails: dict[int, bytes] | None = None
        self._lock = threading.Lock()

    def image(self, shard: str, key: str) -> Image.Image | None:
        """The image of a sample, at most 512 pixels wide and high; None where it is not here or cannot be read."""
        with self._lock:
            if (shard, key) not in self._images:
                while len(self._images) >= HELD_IMAGES:
                    self._images.popitem(last=False)
                self._images[shard, key] = self._read(shard, key)
            self._images.move_to_end((shard, key))
            return self._images[shard, key]

    def _read(self, shard: str, key: str) -> Image.Image | None:
        row = self.rows.get((shard, key))
        if row is None:
            return None
        try:
            data = self._bytes(shard, key, row)
            image = None if data is None else decode_image(data, max_pixels=self.max_pixels)
        except (UserError, ImageError, OSError):
            return None
        if image is not None:
            image.thumbnail((512, 512))
        return image

    def _bytes(self, shard: str, key: str, row: int) -> bytes | None:
        if shard in self._input:
            places = self._of(self._input[shard])
            found = next((place for place in places if place[0] == key), None)
            if found is not None:
                return _stored(self._input[shard], *found)
        if row in self._written:
            folder, rank = self._written[row]
            number, at = divmod(rank, self.per_shard)
            url = self.place.at(f"{folder}/{number:06d}.tar")
            places = self._of(url)
            if at < len(places):
                return _stored(url, *places[at])
        if self._thumbnails is None:
            self._thumbnails = dict(Thumbnails.load(self.place).thumbnails)
        return self._thumbnails.get(row)

    def _of(self, url: str) -> list[tuple[str, int, int]]:
        """``(key, offset, bytes)`` of the images of a shard, in order; the offset is -1 in a compressed one."""
        if url not in self._places:
            while len(self._places) >= HELD_SHARDS:
                self._places.popitem(last=False)
            self._places[url] = [
                (one.key, one.offsets.get(one.image_ext or "", -1), len(one.image))
                for one in read_samples(url)
                if isinstance(one, Sample) and one.image_ext
            ]
        self._places.move_to_end(url)
        return self._places[url]


def _stored(url: str, key: str, offset: int, size: int) -> bytes | None:
    if offset < 0:
        samples: Any = (one for one in read_samples(url) if isinstance(one, Sample) and one.key == key)
        return next((one.image for one in samples), None)
    with open_shard(url) as stream:
        stream.seek(offset)
        return stream.read(size)
