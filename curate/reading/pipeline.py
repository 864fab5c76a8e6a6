"""Reading as a part of webdataset's pipelines: our strict reader is the stage that opens tars, the rest is webdataset.

    shards = SafeShards("out/shards", handler=Skipped()).shuffle(1000).map(image_and_caption)
    loader = torch.utils.data.DataLoader(shards.to_tuple("image", "caption"), batch_size=None, num_workers=2)

The stages stand alone, too: ``DataPipeline(shard_list("out/shards"), split_by_worker, ReadShards(), …)``.

webdataset imports torch, which takes a second, so no command of curation imports this file. There a shard is one task
of one process, its rows stand in its order, and what is bad has a row as well, so that nothing is left to compose.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from webdataset import (
    DataPipeline,
    FluidInterface,
    SimpleShardList,
    detshuffle,
    reraise_exception,
    split_by_node,
    split_by_worker,
)
from webdataset.filters import map as map_stage

from afresh.errors import UserError, printable
from afresh.progress import get_logger
from curate.reading.images import MAX_PIXELS, ImageError, decode_image
from curate.reading.samples import BadSample, Sample, read_samples
from curate.reading.tar import shown
from curate.reading.urls import expand_shards

log = get_logger(__name__)
Handler = Callable[[Exception], bool]
"""webdataset's convention: it raises what it does not bear with; True goes on with the next sample, False stops."""
_PICKLED = ("pkl", "pickle", "pyd", "pth")  # what webdataset's decoders unpickle, which runs what is in it


class BadSampleError(UserError):
    """What a handler sees in the place of a sample that cannot be used.

    Attributes:
        bad: shard (its URL), key, kind and reason; None where torch made the error again out of a worker's text.
    """

    def __init__(self, message: str, bad: BadSample | None = None) -> None:
        super().__init__(message)
        self.bad = bad

    @classmethod
    def of(cls, bad: BadSample) -> BadSampleError:
        """One whose message names shard and sample."""
        key = f": {shown(bad.key)}" if bad.key else ""
        return cls(f"{printable(bad.shard)}{key}: {bad.reason}", bad)


class Skipped:
    """A handler that leaves bad samples out, says so of the first ones, and counts them.

    An error that is no sample's fault, such as a shard that cannot be opened, is raised.

    Args:
        log_at_most: how many are named in the log.

    Attributes:
        kinds: how many of each kind of ``curate check`` were left out, in this process: a DataLoader's workers count
            for themselves.
    """

    def __init__(self, log_at_most: int = 10) -> None:
        self.log_at_most = log_at_most
        self.kinds: Counter[str] = Counter()

    def __call__(self, error: Exception) -> bool:
        if not isinstance(error, BadSampleError) or error.bad is None:
            raise error
        self.kinds[error.bad.kind] += 1
        if self.kinds.total() <= self.log_at_most:
            log.warning("%s (left out)", error)
        return True


def shard_list(shards: str | os.PathLike[str] | Sequence[str]) -> SimpleShardList:
    """The first stage: ``{"url": …}`` of each shard, in order.

    Args:
        shards: as every command takes them: paths, folders, globs, brace ranges or fsspec URLs.

    Raises:
        UsageError: there are none, or one is a ``pipe:`` URL.
    """
    return SimpleShardList(expand_shards([os.fspath(shards)] if isinstance(shards, (str, os.PathLike)) else shards))


@dataclass(frozen=True)
class ReadShards:
    """The stage that opens tars: ``{"url": …}`` → :class:`~curate.reading.samples.Sample`, whose ``shard`` is the URL.

    Args:
        handler: is given a :class:`BadSampleError` for each thing in a shard that is no whole sample, and the
            ``UserError`` of a shard that cannot be opened or read.
        caption_field: field of the samples' ``json`` that holds the caption; empty for ``txt``, or the usual fields.
    """

    handler: Handler = reraise_exception
    caption_field: str = ""

    def __call__(self, urls: Iterable[Mapping[str, str]]) -> Iterator[Sample]:
        """The samples of all shards, in order."""
        for source in urls:
            for item in _samples_and_errors(source["url"], self.caption_field):
                if isinstance(item, Sample):
                    yield item
                elif not self.handler(item):
                    return


def _samples_and_errors(url: str, caption_field: str) -> Iterator[Sample | UserError]:
    try:
        for item in read_samples(url, name=url, caption_field=caption_field):
            yield item if isinstance(item, Sample) else BadSampleError.of(item)
    except UserError as error:
        yield error


def as_dictionary(sample: Sample) -> dict[str, Any]:
    """A sample as webdataset's stages know it: ``__key__``, ``__url__``, and extension (in lower case) → bytes.

    Raises:
        BadSampleError: an extension begins with two underscores, which webdataset keeps for itself.
    """
    members = {ext.lower(): data for ext, data in sample.members.items()}
    if reserved := next((ext for ext in members if ext.startswith("__")), None):
        reason = f"refused member {shown(f'{sample.key}.{reserved}')}: the name is one of webdataset's own"
        raise BadSampleError.of(BadSample(sample.shard, sample.key, reason, "refused_member"))
    return {"__key__": sample.key, "__url__": sample.shard, **members}


def image_and_caption(
    sample: Mapping[str, Any],
    *,
    max_pixels: int = MAX_PIXELS,
    caption_field: str = "",
    missing_caption: Literal["unreadable", "empty"] = "unreadable",
) -> dict[str, Any]:
    """A dictionary of bytes → ``__key__``, ``__url__``, ``image`` (PIL, RGB) and ``caption``, by the rules of curation.

    Args:
        sample: what :func:`as_dictionary` gives.
        max_pixels: images with more pixels are refused before they are decoded.
        caption_field: field of ``json`` that holds the caption; empty for ``txt``, or the usual fields.
        missing_caption: whether a sample without a caption that can be read is an error, or has an empty one.

    Raises:
        BadSampleError: no image, or one that cannot be decoded, or no caption.
    """
    members = {name: data for name, data in sample.items() if not name.startswith("__")}
    whole = Sample(str(sample["__url__"]), str(sample["__key__"]), members, caption_field=caption_field)

    def bad(kind: str, reason: str) -> BadSampleError:
        return BadSampleError.of(BadSample(whole.shard, whole.key, reason, kind))

    if whole.image_ext is None:
        raise bad("no_image", "no image among its members")
    try:
        image = decode_image(whole.image, max_pixels=max_pixels)
    except ImageError as error:
        raise bad("unreadable_image", str(error)) from error
    if whole.caption is None and missing_caption == "unreadable":
        raise bad("no_caption", str(whole.caption_problem))
    return {"__key__": whole.key, "__url__": whole.shard, "image": image, "caption": whole.caption or ""}


class SafeShards(DataPipeline, FluidInterface):
    """``webdataset.WebDataset`` over our reader: dictionaries of bytes, and ``.shuffle``, ``.map``, ``.to_tuple``, ….

    Nodes (``RANK`` and ``WORLD_SIZE``, or torch.distributed) and the workers of a DataLoader share out the shards, so
    that each sample comes once.

    Args:
        shards: see :func:`shard_list`.
        handler: of what is no whole sample, see :class:`ReadShards`; by default it is raised. :class:`Skipped` leaves
            it out.
        shardshuffle: shards among which the next one is drawn, anew in each epoch; False keeps their order.
        seed: of that.
        nodesplitter, workersplitter: webdataset's; None shares nothing out.

    Raises:
        UsageError: there are no shards.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str],
        *,
        handler: Handler = reraise_exception,
        shardshuffle: int | Literal[False] = False,
        seed: int = 0,
        nodesplitter: Callable[[Any], Any] | None = split_by_node,
        workersplitter: Callable[[Any], Any] | None = split_by_worker,
    ) -> None:
        shuffle = detshuffle(shardshuffle, seed=seed) if shardshuffle else None
        stages = (nodesplitter, workersplitter, shuffle, ReadShards(handler), map_stage(as_dictionary, handler=handler))
        super().__init__(shard_list(shards), *stages)  # which passes over None

    def decode(self, *handlers: Any, **options: Any) -> SafeShards:
        """Decode as webdataset does, but leave as bytes what it would unpickle, unless one of ``handlers`` takes it."""
        return super().decode(*handlers, _left_as_bytes, **options)


def _left_as_bytes(key: str, data: bytes) -> bytes | None:
    """A decoder of webdataset's kind, for members that are programs."""
    return data if key.rpartition(".")[2].lower() in _PICKLED else None
