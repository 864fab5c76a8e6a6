"""``find_duplicates``: the decisions of ``curate dedup`` as a table, without a folder of results.

    import afresh

    table = afresh.find_duplicates("photos")
    print(table.to_pandas())

What is read (a folder of images, shards, a list, embeddings) becomes the rows of the read stage; joining and deciding
are the stages of the job, and the table is drawn from the ledger that it would write.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afresh.cores import cpu_count, shares
from afresh.errors import UsageError, one_line
from afresh.files import files_in
from curate.config import DedupConfig
from curate.dedup import check_settings
from curate.engines.local import LocalEngine
from curate.importing.image_files import Given, ImageFile, ImageFiles, files_of
from curate.reading.samples import Shard
from curate.reading.urls import expand_shards, shard_bytes, shard_names
from curate.results.ledger import KEPT, UNREADABLE
from curate.stages.decide import decide_stage
from curate.stages.join import join_stage
from curate.stages.publish import ledger_table
from curate.stages.read import Samples, cached_embedder, read_into
from curate.stages.rows import READ_COLUMNS, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Image] | NDArray[Any]

SCHEMA = pa.schema(
    [
        pa.field("group", pa.int64()),  # from 0; null when unreadable
        pa.field("group_size", pa.int64()),
        pa.field("source", pa.string(), nullable=False),  # path, "shard/key", or the number of a row or image
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("stand_in", pa.string()),  # the source that was kept in the place of this one
        pa.field("similarity", pa.float32()),  # cosine of the two images
        pa.field("reason", pa.string()),  # as in the ledger; of what is unreadable, the error
    ]
)
FILES_TOGETHER = 2048  # image files that are read by one task


def find_duplicates(
    source: Source,
    *,
    threshold: float = 0.9,
    embedder: str = "layout",
    rule: str = "greedy",
    prefer: Sequence[str] | None = None,
    keep_copies: int = 1,
    captions: Sequence[str | None] | None = None,
    lone: bool = False,
    max_pixels: int = 64_000_000,
    workers: int = 1,
) -> pa.Table:
    """Which images show the same, and which of them is to be kept, as ``curate dedup`` decides it.

    Args:
        source: a folder of image files at any depth, local or at a URL; shards (``*.tar``: paths, a folder of them, a
            glob, a brace range or fsspec URLs, or a list of these); an iterable of paths of image files and of PIL
            images; or embeddings, ``[n, d]`` numbers whose rows are compared by their cosine.
        threshold: two images with at least this cosine similarity are near, in (0, 1].
        embedder: what images are compared by, as ``image_embedder`` of ``curate dedup``. Not for embeddings.
        rule: ``greedy``, ``components``, or another one as ``curate dedup`` takes it.
        prefer: which of several copies is kept, as in ``curate dedup``; by default the one with most pixels, then the
            one with the longest caption. Of embeddings always the first.
        keep_copies: how many near copies of an image may stay.
        captions: one for each image of an iterable, or row of embeddings; None has none. A folder's stand beside the
            images (``.txt``, ``.json``), those of shards in their samples. None are needed. They decide between stand-
            ins, and tell a ``near_pair`` from a ``near_image``.
        lone: also give the samples that are alone in their group.
        max_pixels: images with more pixels are refused before they are decoded.
        workers: processes; 1 stays in this one and reads on threads, 0 takes a process for each CPU core (then the
            script needs ``if __name__ == "__main__":``). The result is the same.

    Returns:
        A row for every member of a group, group by group, the kept ones first, in the columns of ``SCHEMA``; then what
        was left out without a copy; then what cannot be read, with the error as its ``reason``. ``to_pandas()`` makes
        a data frame of it.

    Raises:
        UsageError: a setting is out of range, or there is nothing to read at ``source``.
        UserError: a shard or a store cannot be opened.
    """
    if isinstance(source, (str, os.PathLike)):
        source = os.fspath(source)
    of_embeddings = hasattr(source, "__array__") and hasattr(source, "ndim")
    config = DedupConfig(
        image_embedder=embedder, threshold=threshold, rule=rule, keep_copies=keep_copies, max_pixels=max_pixels,
        missing_caption="empty", sweep=0.0, workers=workers, join="auto",
    )  # fmt: skip
    if prefer is not None:
        config.prefer = [prefer] if isinstance(prefer, str) else list(prefer)
    if of_embeddings:
        if prefer:
            raise UsageError("prefer: embeddings tell nothing of their images; order them by preference instead")
        config.prefer = []
    check_settings(config)
    config.workers = 0  # the join works on threads, on all cores
    with tempfile.TemporaryDirectory(prefix="afresh-") as work:
        if of_embeddings:
            rows = _rows_of_embeddings(np.asarray(source), captions)
        else:
            rows = _read(source, captions, config, Path(work), workers)
        ledger = _decided(rows, config, Path(work))
    return _as_groups(ledger, lone)


def _rows_of_embeddings(embeddings: NDArray[Any], captions: Sequence[str | None] | None) -> Rows:
    """Rows that have an embedding and a number, and each a picture of its own."""
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f":
        raise UsageError(
            f"embeddings: expected floating-point numbers [n, d], got {embeddings.dtype} {list(embeddings.shape)}"
        )
    n = len(embeddings)
    if captions is not None and len(captions) != n:
        raise UsageError(f"captions: there are {len(captions)} of them, and {n} embeddings")
    numbers = [str(row) for row in range(n)]
    given: dict[str, list[Any]] = {"shard": [""] * n, "key": numbers, "pixels": numbers, "lossless": [False] * n}
    given |= {"width": [0] * n, "height": [0] * n, "numbers": [[]] * n, "caption": list(captions or [None] * n)}
    columns = [pa.array(given.get(name, [None] * n), kind) for name, kind in READ_COLUMNS]
    return Rows(
        table=pa.table(columns, names=[name for name, _ in READ_COLUMNS]),
        starts=np.array([0, n]),
        readable=np.arange(n),
        embeddings=embeddings,
    )


def _read(
    source: Any, captions: Sequence[str | None] | None, config: DedupConfig, work: Path, workers: int
) -> Rows:
    """Everything that ``source`` names, through the read stage."""
    cached_embedder.cache_clear()  # a file of the same name may be another one by now
    embedder = cached_embedder(config.image_embedder)
    sources, sizes = _sources(source, captions, config)
    in_memory = isinstance(sources[0], Given)  # does not travel to other processes
    with LocalEngine(1 if in_memory else workers) as engine:
        alone = engine.workers == 1 or len(sources) == 1
        threads = [cpu_count()] * len(sources) if alone else shares(sizes, engine.workers)
        caches = [work / f"{number}.parquet" for number in range(len(sources))]
        read_into(engine, list(zip(sources, caches, strict=True)), threads, config)
    return Rows.load(caches, embedder.dim, config.missing_caption)


def _sources(
    source: Any, captions: Sequence[str | None] | None, config: DedupConfig
) -> tuple[list[Samples], list[int | None]]:
    """What is read by one task each, and its bytes, where they are known."""
    if (shards := _shards(source)) is not None or isinstance(source, str):
        if captions is not None:
            raise UsageError("captions: a folder and shards have their own; give captions with a list of images")
        if shards is not None:
            names = shard_names(shards)
            return [Shard(url, name) for url, name in zip(shards, names, strict=True)], list(map(shard_bytes, shards))
        if "://" not in source and os.path.isfile(source):
            raise UsageError(f"{source}: is one file; name a folder, shards (*.tar), or a list of image files")
        files = files_of(source)
        if not files:
            raise UsageError(f"{source}: holds no image files")
        return _in_parts(source, files, config)
    if not isinstance(source, Iterable) or hasattr(source, "getexif"):
        raise UsageError(
            f"source: expected a folder, shards, image files, images or embeddings, got {type(source).__name__}"
        )
    if isinstance(source, (list, tuple)) and source and all(isinstance(one, (str, os.PathLike)) for one in source):
        if captions is not None and len(captions) != len(source):
            raise UsageError(f"captions: there are {len(captions)} of them, and {len(source)} images")
        texts = captions or [None] * len(source)
        files = [ImageFile(os.fspath(path), caption=text) for path, text in zip(source, texts, strict=True)]
        return _in_parts("", files, config)
    return [Given(source, captions, config.max_pixels)], [None]


def _shards(source: Any) -> list[str] | None:
    """The shards that ``source`` means, if it means shards."""
    patterns = [source] if isinstance(source, str) else source
    if not isinstance(patterns, (list, tuple)) or not patterns:
        return None
    names = [os.fspath(one) if isinstance(one, (str, os.PathLike)) else "" for one in patterns]
    if all(map(_names_shards, names)):
        return expand_shards(names)
    return None


def _names_shards(name: str) -> bool:
    """Whether a path, pattern or URL is one of tars."""
    if "://" not in name and os.path.isdir(name):
        return bool(files_in(Path(name), "*.tar"))
    ends = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
    return name.partition("?")[0].lower().endswith(ends) or name.lower().endswith(ends)


def _in_parts(
    folder: str, files: Sequence[ImageFile], config: DedupConfig
) -> tuple[list[Samples], list[int | None]]:
    starts = range(0, len(files), FILES_TOGETHER)
    parts = [ImageFiles(folder, tuple(files[at : at + FILES_TOGETHER]), config.max_pixels) for at in starts]
    return list(parts), [None] * len(parts)


def _decided(rows: Rows, config: DedupConfig, work: Path) -> pa.Table:
    """The ledger of a curation of these rows."""
    from curate.embed.registry import load_caption_embedder

    if len(rows.readable) == 0:
        return ledger_table(rows, None, None)
    try:
        joined = join_stage(None, work, rows, [], load_caption_embedder(config.caption_embedder), config)
    except ValueError as error:  # a row that is not finite
        raise UsageError(f"embeddings: {one_line(error)}") from error
    verdicts, _ = decide_stage(rows, joined, None, None, config)
    return ledger_table(rows, verdicts, None)


def _as_groups(ledger: pa.Table, lone: bool) -> pa.Table:
    """The table of SCHEMA out of a ledger; see :func:`find_duplicates`."""
    group = ledger["group"].fill_null(-1).to_numpy()
    kept = pc.equal(ledger["status"], KEPT).to_numpy()
    unreadable = pc.equal(ledger["status"], UNREADABLE).to_numpy()
    alone = ledger["group_size"].fill_null(1).to_numpy() == 1
    part = np.select([unreadable, alone & ~kept], [2, 1], 0)
    order = np.lexsort((~kept, group, part))
    if not lone:
        order = order[(~alone | ~kept)[order]]
    numbers = np.full(len(group), -1)
    named = order[~unreadable[order]]
    fresh = np.ones(len(named), bool)
    fresh[1:] = group[named][1:] != group[named][:-1]
    numbers[named] = np.cumsum(fresh) - 1
    columns = {
        "group": pa.array(numbers, mask=unreadable),
        "group_size": ledger["group_size"],
        "source": _named(ledger["shard"], ledger["key"]),
        "kept": pa.array(kept),
        "stand_in": _named(ledger["kept_shard"], ledger["kept_key"]),
        "similarity": ledger["image_similarity"],
        "reason": ledger["reason"],
    }
    return pa.table(columns).take(pa.array(order)).cast(SCHEMA).combine_chunks()


def _named(shard: pa.ChunkedArray, key: pa.ChunkedArray) -> pa.ChunkedArray:
    """``shard/key``; of what has no shard the key, and of an archive itself its name."""
    both = pc.binary_join_element_wise(shard, key, "/")
    both = pc.if_else(pc.equal(shard, ""), key, both)
    return pc.if_else(pc.equal(key, ""), shard, both)
