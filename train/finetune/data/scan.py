"""What the shards of a run hold: keys, captions, sizes and places of all samples, read once and kept beside the run.

``samples.arrow`` has a record batch for each shard and is memory-mapped, so that processes and workers share one copy
of it, and a resumed run begins at once. It fixes which sample is which row, whatever becomes of the shards later.
Curation's ledger cannot stand in for it: it tells neither where in the new shards a sample lies nor which captions it
was given from its copies. Nor can webdataset's pipelines (:mod:`curate.reading.pipeline`) stand in for the reading
behind it: they do not tell where in a shard an image lies, so a resumed run could not go on at a position.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from afresh.errors import UsageError, UserError
from afresh.files import digest, write_atomic
from afresh.progress import get_logger
from curate.decisions.sample_lists import listed_keys, refuse_missing
from curate.engines.local import LocalEngine
from curate.reading.images import MAX_PIXELS, ImageError, image_size
from curate.reading.samples import BadSample, Sample, Shard
from curate.reading.urls import expand_shards, fingerprint, shard_bytes, shard_names
from train.finetune.config import FinetuneConfig, ShardGroup
from train.finetune.data.together import on_first

if TYPE_CHECKING:
    from accelerate import Accelerator


log = get_logger(__name__)
FORMAT = 3
ALONE_BYTES = 1 << 28  # shards of less than this together are read faster than processes start
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("captions", pa.list_(pa.string())),  # none: a scan's parts alone, of a sample that lacks one
        pa.field("weight", pa.float32()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("offset", pa.int64()),  # of the image in the shard's file; -1 in a compressed one
        pa.field("bytes", pa.int64()),  # of the image
        pa.field("crc32", pa.uint32()),  # of the image
    ]
)


def sample_captions(sample: Sample) -> tuple[str, ...]:
    """What a sample may be trained on: its captions, or the empty one where it has that; none of none."""
    return sample.captions or (() if sample.caption is None else ("",))


class ShardSet:
    """The samples of a run, of which a *row* is the number in the order of the shards.

    Pickled as the path of its file, which every process maps into memory.

    Args:
        path: ``samples.arrow`` from :func:`scan`.

    Attributes:
        urls, names: of the shards; a sample's identity is ``(name, key)``.
        fingerprints: of the shards when they were read.
        repeats: how often the samples of each shard stand in an epoch.
        weights: what the samples of each shard count, beside their own weights.
        counts: usable samples of each shard, ``[shards]`` int64.
        left_out: what stood in the shards and is no usable sample.
        max_pixels: above which images are refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        about = json.loads(self._reader.schema.metadata[b"afresh"])
        self.urls: list[str] = about["urls"]
        self.names: list[str] = about["names"]
        self.fingerprints: list[list[str | int]] = about["fingerprints"]
        self.repeats: list[int] = about["repeats"]
        self.weights: list[float] = about.get("weights") or [1.0] * len(self.repeats)
        self.left_out: int = about["left_out"]
        self.max_pixels: int = about["max_pixels"]
        self.counts = np.array(about["counts"], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(self.counts)])
        self.shard = lru_cache(maxsize=256)(self._reader.get_batch)  # a view of the mapped file

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, (self.path,)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """``(shard, place within the shard)`` of a row."""
        shard = int(np.searchsorted(self._offsets, row, side="right")) - 1
        return shard, row - int(self._offsets[shard])

    def value(self, row: int, column: str) -> Any:
        """One field of a row."""
        shard, place = self.locate(row)
        return self.shard(shard).column(column)[place].as_py()

    def weight(self, row: int) -> float:
        """What a row's loss is multiplied by: its own weight times that of its shard."""
        return self.value(row, "weight") * self.weights[self.locate(row)[0]]

    def column(self, shard: int, column: str) -> NDArray[Any]:
        """A column of numbers of one shard, ``[counts[shard]]``, not copied."""
        return self.shard(shard).column(column).to_numpy()

    def identity(self, row: int) -> tuple[str, str]:
        """``(shard's name, key)`` of a row."""
        shard, place = self.locate(row)
        return self.names[shard], self.shard(shard).column("key")[place].as_py()

    def captions(self, row: int) -> tuple[str, ...]:
        """Of a row, at least one."""
        return tuple(self.value(row, "captions"))

    def captioned(self) -> bool:
        """Whether any sample has a caption other than the empty one."""
        parts = (self.shard(number).column("captions").flatten() for number in range(len(self.counts)))
        return any(pc.any(pc.not_equal(part, "")).as_py() for part in parts)

    @property
    def ids(self) -> Identities:
        """``(shard's name, key)`` of each row, looked up when asked for."""
        return Identities(self)


class Identities(Sequence[tuple[str, str]]):
    """``(shard's name, key)`` by row, as a sequence that holds none of them."""

    def __init__(self, shard_set: ShardSet) -> None:
        self._shard_set = shard_set

    def __len__(self) -> int:
        return len(self._shard_set)

    def __getitem__(self, row: Any) -> Any:
        return self._shard_set.identity(row)


@dataclass(frozen=True)
class _ScanTask:
    url: str
    name: str
    part: Path
    caption_field: str
    weight_field: str | None
    max_pixels: int
    excluded: frozenset[str]


def scan(
    shards: Sequence[str | ShardGroup],
    path: Path,
    *,
    workers: int = 1,
    caption_field: str = "",
    weight_field: str | None = None,
    exclude: str = "",
    missing_caption: Literal["auto", "unreadable", "empty"] = "auto",
    max_pixels: int = MAX_PIXELS,
) -> ShardSet:
    """What the shards hold; read from ``path`` if a scan was written there before.

    A later scan of the same ``path`` gives the same rows even if shards were added, changed or lost meanwhile: it
    warns, and samples that can no longer be read as they were are found missing when they are asked for.

    Args:
        shards: paths, globs, brace ranges, folders or URLs, some perhaps with their repeats.
        path: of ``samples.arrow``, in the folder of the run.
        workers: processes that read the shards.
        caption_field: field of a sample's json that holds its caption; empty for the usual places.
        weight_field: field of a sample's json with its weight in the loss; 1 where there is none.
        exclude: a list of samples to leave out (:mod:`curate.decisions.sample_lists`); empty for none.
        missing_caption: what becomes of samples without a caption that can be read, as in ``curate dedup``.
        max_pixels: images with more pixels are refused.

    Raises:
        UsageError: a pattern names nothing, a shard is given twice with different repeats, or the list of samples to
            leave out cannot be read or is not of these shards.
        UserError: there is no usable sample, a weight is negative, or a sample to leave out is not there.
    """
    if path.is_file():
        shard_set = ShardSet(path)
        _warn_of_changes(shard_set, shards)
        return shard_set
    repeats = expand_groups(shards)
    urls, names = list(repeats), shard_names(list(repeats))
    fingerprints = [fingerprint(url) for url in urls]
    excluded = [frozenset(keys) for keys in listed_keys(exclude, urls)] if exclude else [frozenset()] * len(urls)
    work = path.with_name(path.name + ".parts")
    work.mkdir(parents=True, exist_ok=True)
    parts = [
        work / f"{digest([FORMAT, url, name, mark, caption_field, weight_field, max_pixels, sorted(keys)])}.arrow"
        for url, name, mark, keys in zip(urls, names, fingerprints, excluded, strict=True)
    ]
    tasks = [
        _ScanTask(url, name, part, caption_field, weight_field, max_pixels, keys)
        for url, name, part, keys in zip(urls, names, parts, excluded, strict=True)
        if not part.is_file()
    ]
    sizes = [shard_bytes(url) for url in urls]
    alone = None not in sizes and sum(size or 0 for size in sizes) < ALONE_BYTES
    LocalEngine(1 if alone else max(workers, 1)).map(_scan_shard, tasks, desc="scan")
    whole = [_Part.read(part) for part in parts]
    if exclude:
        refuse_missing(exclude, names, excluded, [part.excluded for part in whole])
    if missing_caption == "unreadable" or (missing_caption == "auto" and any(part.captioned for part in whole)):
        whole = [part.with_captions() for part in whole]
    if not any(part.rows.num_rows for part in whole):
        shutil.rmtree(work)
        but = " and is not excluded" if exclude else ""
        lost = sum(part.captionless for part in whole)
        lost_captions = f"; {lost} lack nothing but a caption: --missing_caption empty takes them" if lost else ""
        shown = ", ".join(map(str, shards))
        raise UserError(f"{shown}: the shards hold no sample with an image that can be read{but}{lost_captions}")
    about = {
        "urls": urls,
        "names": names,
        "fingerprints": fingerprints,
        "repeats": list(repeats.values()),
        "weights": group_weights(shards),
        "counts": [part.rows.num_rows for part in whole],
        "left_out": sum(part.left_out for part in whole),
        "max_pixels": max_pixels,
    }
    _join(whole, path, about)
    shutil.rmtree(work)
    return ShardSet(path)


@dataclass(frozen=True)
class _Part:
    """The scan of a shard.

    Attributes:
        rows: a record batch of SCHEMA.
        left_out: what is no usable sample.
        excluded: keys of the list that stand there.
        captioned: whether some sample has a caption, be it one that cannot be read.
        captionless: samples that were left out for their caption alone.
    """

    rows: pa.RecordBatch
    left_out: int
    excluded: frozenset[str]
    captioned: bool
    captionless: int = 0

    @classmethod
    def read(cls, path: Path) -> _Part:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            about = json.loads(reader.schema.metadata[b"afresh"])
            rows = reader.get_batch(0).replace_schema_metadata(None)
        return cls(rows, about["left_out"], frozenset(about["excluded"]), about["captioned"])

    def with_captions(self) -> _Part:
        """Only what has captions."""
        has = pc.greater(pc.list_value_length(self.rows.column("captions")), 0)
        lost = self.rows.num_rows - (pc.sum(has).as_py() or 0)
        return replace(self, rows=self.rows.filter(has), left_out=self.left_out + lost, captionless=lost)

    def trained_on(self) -> pa.RecordBatch:
        """The rows, with the empty caption where there is none."""
        captions = [texts or [""] for texts in self.rows.column("captions").to_pylist()]
        place = self.rows.schema.get_field_index("captions")
        return self.rows.set_column(place, SCHEMA.field("captions"), pa.array(captions, pa.list_(pa.string())))


def _join(parts: Sequence[_Part], path: Path, about: dict[str, Any]) -> None:
    """Write the scans of all shards as one; say how many samples have no caption."""
    empty = 0
    with _writer(path, about) as writer:
        for part in parts:
            rows = part.trained_on()
            empty += pc.sum(pc.equal(rows.column("captions").flatten(), "")).as_py() or 0
            writer.write_batch(rows)
    if lost := sum(part.captionless for part in parts):
        log.warning(
            "%d samples have no caption that can be read, and are left out: missing_caption empty trains on them with "
            "the empty one", lost,
        )  # fmt: skip
    if empty:
        log.warning(
            "%d of %d samples have no caption, and are trained on with the empty one (caption_field names the field of "
            "the json that holds it)", empty, sum(about["counts"]),
        )  # fmt: skip


def scan_once(config: FinetuneConfig, accelerator: Accelerator) -> ShardSet:
    """:func:`scan` for a run of several processes: the first one reads, the others wait."""
    path = Path(config.out) / "samples.arrow"
    reading = partial(
        scan,
        workers=config.workers,
        caption_field=config.caption_field,
        weight_field=config.weight_field,
        exclude=config.exclude,
        missing_caption=config.missing_caption,
        max_pixels=config.max_pixels,
    )
    on_first(accelerator, reading, config.shards, path)
    return ShardSet(path)


def expand_groups(shards: Sequence[str | ShardGroup]) -> dict[str, int]:
    """Every shard and its repeats, in the order of the groups.

    Raises:
        UsageError: a pattern names nothing, repeats are below 1, or a shard is given twice with different ones.
    """
    groups = [ShardGroup(group) if isinstance(group, str) else group for group in shards]
    if not groups:
        raise UsageError("no shards given: name tar files, a folder of them, or a glob")
    found: dict[str, int] = {}
    for group in groups:
        if group.repeats < 1:
            raise UsageError(f"shards {group.path!r}: repeats must be 1 or more, not {group.repeats}")
        for url in expand_shards(group.path):
            if found.setdefault(url, group.repeats) != group.repeats:
                raise UsageError(f"shard {url} is given twice, with repeats {found[url]} and {group.repeats}")
    return found


def group_weights(shards: Sequence[str | ShardGroup]) -> list[float]:
    """The weight of every shard, in the order of :func:`expand_groups`.

    Raises:
        UsageError: a weight is negative.
    """
    found: dict[str, float] = {}
    for group in (ShardGroup(group) if isinstance(group, str) else group for group in shards):
        if group.weight < 0:
            raise UsageError(f"shards {group.path!r}: weight must be 0 or more, not {group.weight}")
        for url in expand_shards(group.path):
            found.setdefault(url, group.weight)
    return list(found.values())


def _warn_of_changes(shard_set: ShardSet, shards: Sequence[str | ShardGroup]) -> None:
    lost, changed = [], []
    for url, before in zip(shard_set.urls, shard_set.fingerprints, strict=True):
        try:
            now = fingerprint(url)
        except UserError:
            lost.append(url)
            continue
        if (now[0], now[-1]) != (before[0], before[-1]):  # of a local file the size and the ends, not the time
            changed.append(url)
    try:
        added = [url for url in expand_groups(shards) if url not in set(shard_set.urls)]
    except UsageError:
        added = []
    for urls, what in (
        (lost, "cannot be opened any more: other samples stand in for theirs"),
        (changed, "changed since the run was begun: samples that are not there as before are replaced by others"),
        (added, "came after the run was begun: left out"),
    ):
        if urls:
            more = f" and {len(urls) - 3} more" if len(urls) > 3 else ""
            log.warning("%s%s: %s", ", ".join(urls[:3]), more, what)


def _scan_shard(task: _ScanTask) -> None:
    """Write the record batch of one shard."""
    columns: dict[str, list[Any]] = {field.name: [] for field in SCHEMA}
    left_out, excluded, captioned = 0, [], False
    for item in Shard(task.url, task.name, task.caption_field).accounted():
        if item.key in task.excluded:
            excluded.append(item.key)
            continue
        if isinstance(item, Sample):
            captioned = captioned or not item.captionless
            try:
                row = _describe(item, task)
            except ImageError as error:
                item = BadSample(item.shard, item.key, str(error), "unreadable_image")
            else:
                for column, value in row.items():
                    columns[column].append(value)
                continue
        log.warning("%s: %s: %s (left out)", item.shard, item.key, item.reason)
        left_out += 1
    with _writer(task.part, {"left_out": left_out, "excluded": excluded, "captioned": captioned}) as writer:
        writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))


def _describe(sample: Sample, task: _ScanTask) -> dict[str, Any]:
    data = sample.image
    width, height = image_size(data, max_pixels=task.max_pixels)
    weight = sample.number(task.weight_field) if task.weight_field else None
    if weight is not None and weight < 0:
        where = f"{sample.shard}: {sample.key}: {task.weight_field}"
        raise UserError(f"{where} is {weight}: weights must be 0 or more")
    return {
        "key": sample.key,
        "captions": sample_captions(sample),
        "weight": 1.0 if weight is None else weight,
        "width": width,
        "height": height,
        "offset": sample.offsets.get(sample.image_ext or "", -1),
        "bytes": len(data),
        "crc32": zlib.crc32(data),
    }


@contextmanager
def _writer(path: Path, about: dict[str, Any]) -> Iterator[pa.RecordBatchFileWriter]:
    """An Arrow file that says something about itself, written atomically."""
    schema = SCHEMA.with_metadata({"afresh": json.dumps(about)})
    with write_atomic(path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        yield writer


def captions_by_shard(shard_set: ShardSet) -> Iterator[list[str]]:
    """All captions of each shard, in order."""
    for shard in range(len(shard_set.urls)):
        yield shard_set.shard(shard).column("captions").flatten().to_pylist()

