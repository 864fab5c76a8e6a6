"""TrainingIndex: what curation leaves for the sampler and for search.

A folder of three files, written whole or not at all: ``embeddings.npy`` (float16 ``[n, d]``, read as a memory
map), ``samples.parquet`` (shard, key, caption, kept, group of each row) and ``index.json`` (embedder, shape,
calibration). Rows are the kept samples and the dropped ones: a dropped near-copy is still a training image
somebody may have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from afresh.errors import UsageError, UserError, reason
from afresh.files import write_atomic, write_json
from afresh.storage import Store
from curate.columns import BLOCK, Column, numbered
from curate.index.calibration import Calibration, nearest_distinct, without_twins
from curate.reading.captions import normalise_caption

if TYPE_CHECKING:
    from torch import Tensor


FORMAT = 1
ROW_GROUP = 1 << 14  # rows of the table that are read together
FILES = ("embeddings.npy", "samples.parquet", "index.json")  # in the order in which they are written
_BLOCK_ELEMENTS = 1 << 24  # float32 elements of the index that are compared at a time: 64 MB
_HELD_BYTES = 1 << 30  # what a sampler may keep in memory of an index: a million rows of 256


class Known(Protocol):
    """By what an index knows an embedder (:class:`curate.embed.protocol.Embedder`)."""

    name: str

    @property
    def digest(self) -> str: ...


@dataclass(frozen=True)
class TrainingIndex:
    """Embeddings of a training set, searchable, with each row's caption and how often it occurs.

    Attributes:
        embeddings: float16 ``[n, d]``; a memory map when loaded.
        captions: of each row; None where there is none. When loaded they stay on disk, as shards and keys do.
        shards, keys: identity of each row.
        kept: bool ``[n]``, whether curation kept the row.
        group: int64 ``[n]``, rows of one image (and its copies) share a number.
        embedder: name or path for ``load_embedder``.
        calibration: onto SSCD's scale.
        embedder_digest: of the embedder's weights and preparation of images, which is what it is known by; empty in an
            index that did not note it.
    """

    embeddings: NDArray[np.float16]
    captions: Sequence[str | None]
    shards: Sequence[str]
    keys: Sequence[str]
    kept: NDArray[np.bool_]
    group: NDArray[np.int64]
    embedder: str
    calibration: Calibration = field(default_factory=Calibration)
    embedder_digest: str = ""

    @classmethod
    def build(
        cls,
        embeddings: NDArray,
        captions: Sequence[str | None],
        shards: Sequence[str],
        keys: Sequence[str],
        kept: NDArray,
        group: NDArray,
        embedder_name: str,
        embedder_digest: str = "",
        threshold: float | None = None,
    ) -> TrainingIndex:
        """An index in memory, calibrated on its own kept samples.

        Args:
            embeddings: ``[n, d]`` floating, unit rows; stored as float16.
            captions, shards, keys: of each row.
            kept: ``[n]`` bool.
            group: ``[n]`` int, equal for copies of one image.
            embedder_name: name or path for ``load_embedder``.
            embedder_digest: the embedder's.
            threshold: the cosine from which the set counts two images as one. None where none was chosen: then rows
                that are nearer than others of the set ever are do not count as others either.

        Raises:
            ValueError: the lengths differ.
        """
        lengths = {
            "embeddings": len(embeddings),
            "captions": len(captions),
            "shards": len(shards),
            "keys": len(keys),
            "kept": len(kept),
            "group": len(group),
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"an index has one of each a row, not {lengths}")
        rows = np.ascontiguousarray(embeddings, np.float16)
        kept, group = np.asarray(kept, bool), np.asarray(group, np.int64)
        others = nearest_distinct(rows, kept, group, threshold)
        calibration = Calibration.fit(without_twins(others) if threshold is None else others)
        return cls(rows, captions, shards, keys, kept, group, embedder_name, calibration, embedder_digest)

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def digest(self) -> str:
        """Changes when the rows do, wherever the index lies: 32 hex characters."""
        content = hashlib.sha256(np.ascontiguousarray(self.embeddings).data)
        for column in (self.shards, self.keys, self.kept):
            parts = (json.dumps(block)[1:-1] for block in _blocks_of(column))  # as json.dumps of all would be
            content.update(b"[")
            for number, part in enumerate(parts):
                content.update(f"{', ' if number else ''}{part}".encode())
            content.update(b"]")
        return content.hexdigest()[:32]

    @property
    def dim(self) -> int:
        """Length of the embeddings."""
        return self.embeddings.shape[1]

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """``[n]``: how many rows bear the same normalised caption; 0 where there is no caption."""
        counts = np.zeros(len(self), np.int64)
        texts = (c for block in _blocks_of(self.captions) for c in block)
        there = np.fromiter((c is not None for c in texts), bool, len(self))
        texts = (normalise_caption(c) for block in _blocks_of(self.captions) for c in block if c is not None)
        number, first = numbered(texts, int(there.sum()))
        counts[there] = np.bincount(number, minlength=len(first))[number]
        return counts

    @cached_property
    def group_counts(self) -> NDArray[np.int64]:
        """``[n]``: how many rows show the same image or a copy of it."""
        _, inverse, sizes = np.unique(self.group, return_inverse=True, return_counts=True)
        return sizes[inverse].astype(np.int64)

    def vectors(self, rows: Any) -> NDArray[np.float32]:
        """float32 unit rows ``[…, d]`` of an array of row numbers."""
        found = self.embeddings[np.asarray(rows)].astype(np.float32)
        return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)

    def search(self, vectors: Any, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The ``k`` nearest rows of each vector, exactly; nearest first, of equals the earlier row first.

        Args:
            vectors: ``[m, d]``, or ``[d]`` for one; numpy or torch; need not be unit vectors.
            k: how many; not more than there are rows are answered.

        Returns:
            ``(similarity [m, min(k, n)] float32, rows [m, min(k, n)] int64)``.

        Raises:
            ValueError: vectors of another length than the index's.
        """
        import torch

        queries = torch.atleast_2d(torch.as_tensor(vectors).detach().float())
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"the index holds vectors of length {self.dim} ({self.embedder}), not {list(queries.shape)}"
            )
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        queries = queries.to("cpu" if self._held is None else self._held.device)
        queries = queries / queries.norm(dim=1, keepdim=True).clamp_min(1e-12)
        # Not curate.neighbors.brute_force: a sampler asks at every step, of rows that stay on a device.
        # They stand first in the product, and a single vector twice: on CPUs several times as fast, and the same.
        columns = (queries if len(queries) > 1 else queries.repeat(2, 1)).T
        best = queries.new_empty(len(queries), 0)
        best_rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        with torch.no_grad(), _float32_products(queries.device.type):
            for start, rows in self._blocks(len(queries)):
                similarity = (rows @ columns)[:, : len(queries)].T
                best, best_rows = _merge(best, best_rows, similarity, start, k)
        return best.contiguous().cpu().numpy(), best_rows.contiguous().cpu().numpy()

    def hold(self, device: Any = None, most: int = _HELD_BYTES) -> None:
        """Keep the unit rows in the memory of a device in float32, if they take at most ``most`` bytes.

        For who searches at every step: a search reads all rows, and reading them in half precision from the file and
        normalising them takes ten times as long as comparing them. They are then compared on that device.

        Args:
            device: of torch; a second one takes the place of the first. None is where they are held already, or else
                the CPU.
            most: bytes.
        """
        import torch

        held = self._held
        if device is None:
            device = "cpu" if held is None else held.device
        device = torch.empty(0, device=device).device  # "cuda" is one of them
        if 4 * self.embeddings.size > most or (held is not None and held.device == device):
            return
        rows = torch.empty(self.embeddings.shape, device=device)
        step = max(1, _BLOCK_ELEMENTS // max(self.dim, 1))
        for start in range(0, len(self), step):
            stop = min(start + step, len(self))
            rows[start:stop] = torch.from_numpy(self.vectors(np.arange(start, stop)))
        self.__dict__["_held"] = rows  # the place of the cached property

    def calibrate(self, cosine: Any) -> Any:
        """Cosines of this embedder → SSCD's scale; numpy or torch (differentiable)."""
        return self.calibration(cosine)

    def _blocks(self, queries: int) -> Iterator[tuple[int, Tensor]]:
        """The unit rows where they are held, block by block, each with the number of its first row."""
        import torch

        held = self._held
        # Rows read from the file take memory themselves; on an accelerator each block costs its launches.
        widest = queries if held is not None and held.device.type != "cpu" else max(self.dim, queries)
        step = max(1, _BLOCK_ELEMENTS // max(widest, 1))
        for start in range(0, len(self), step):
            stop = min(start + step, len(self))
            if held is not None:
                yield start, held[start:stop]
            else:
                yield start, torch.from_numpy(self.vectors(np.arange(start, stop)))

    @cached_property
    def _held(self) -> Tensor | None:
        """All unit rows in float32, when they are few or :meth:`hold` was called: a sampler asks at every step."""
        import torch

        few = self.embeddings.size <= _BLOCK_ELEMENTS
        return torch.from_numpy(self.vectors(np.arange(len(self)))) if few else None

    # ----------------------------------------------------------------------------------------------- on disk

    def save(self, folder: str | Path) -> None:
        """Write the folder; the same index gives the same bytes."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"shard": self.shards, "key": self.keys, "caption": self.captions}
        numbers = {"kept": pa.bool_(), "group": pa.int64()}
        schema = pa.schema([*((name, pa.string()) for name in texts), *numbers.items()])
        rows = np.ascontiguousarray(self.embeddings)
        with write_atomic(folder / "embeddings.npy") as path, open(path, "wb") as file:
            # As np.save does, whose own way to write does not say why it fails (a full disk).
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
            file.write(rows.data)
        with write_atomic(folder / "samples.parquet") as path, pq.ParquetWriter(path, schema) as writer:
            for start in range(0, max(1, len(self)), ROW_GROUP):
                some = slice(start, start + ROW_GROUP)
                columns = [pa.array(column[some], pa.string()) for column in texts.values()]
                columns += [pa.array(getattr(self, name)[some], kind) for name, kind in numbers.items()]
                writer.write_table(pa.table(columns, schema=schema))
        # Last: a folder with an index.json is whole.
        write_json(
            folder / "index.json",
            {
                "format": FORMAT,
                "embedder": self.embedder,
                "embedder_digest": self.embedder_digest,
                "rows": len(self),
                "dim": self.dim,
                "calibration": {"cosine": self.calibration.cosine, "value": self.calibration.value},
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> TrainingIndex:
        """Open an index; embeddings stay on disk until they are asked for.

        Args:
            folder: of the index, or the output folder of ``curate dedup`` that has it as ``index``; or the URL of one,
                which is copied to the user's cache folder (``$XDG_CACHE_HOME/afresh``), anew when it has changed.

        Raises:
            UsageError: the URL cannot be opened.
            UserError: a file is missing, or they do not belong together.
        """
        import pyarrow.parquet as pq

        folder = index_folder(folder)
        try:
            about = json.loads((folder / "index.json").read_text())
            stored, rows, dim = about["format"], about["rows"], about["dim"]
            embedder, calibration = about["embedder"], about["calibration"]
            embedder_digest = about.get("embedder_digest", "")
            calibration = Calibration(tuple(calibration["cosine"]), tuple(calibration["value"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'index.json'} is not an index's description: {error!r}") from error
        if stored != FORMAT:
            raise UserError(f"{folder} is an index of format {stored}; this version reads format {FORMAT}")
        try:
            embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
            samples = folder / "samples.parquet"
            table = pq.read_table(samples, columns=["kept", "group"], memory_map=True)
            shards, keys, captions = (Column.of_parquet(samples, name) for name in ("shard", "key", "caption"))
        except Exception as error:
            raise UserError(f"index {folder} cannot be read: {reason(error)}") from error
        if embeddings.shape != (rows, dim) or embeddings.dtype != np.float16 or table.num_rows != rows:
            raise UserError(
                f"index {folder} does not fit together: index.json says {rows} rows of {dim}, "
                f"embeddings.npy is {embeddings.dtype} {list(embeddings.shape)}, "
                f"samples.parquet has {table.num_rows} rows"
            )
        return cls(
            embeddings,
            captions,
            shards,
            keys,
            table["kept"].to_numpy().astype(bool),
            table["group"].to_numpy().astype(np.int64),
            embedder,
            calibration,
            embedder_digest,
        )


def _blocks_of(column: Sequence[Any] | NDArray[Any]) -> Iterator[list[Any]]:
    """A column as lists of Python's objects, some thousands at a time."""
    for start in range(0, len(column), BLOCK):
        block = column[start : start + BLOCK]
        yield block.tolist() if isinstance(block, np.ndarray) else list(block)


def check_index(where: str | Path) -> None:
    """See that an index is there, without reading it; a URL is not asked.

    Raises:
        UserError: names what is missing.
    """
    if "://" not in str(where):
        index_folder(where)


def refuse_other(
    index: TrainingIndex, embedder: Known, where: str = "the index", option: str = "the embedder"
) -> None:
    """See that an embedder is the one that an index was built with: by its weights and how it prepares images, and not
    by its name, under which other weights may lie by now. An index that did not note them goes by the name of the
    embedder, or of its file.

    Args:
        index: of a training set.
        embedder: that is to be compared with its rows.
        where: what to call the index in the message.
        option: what to call the embedder's setting there.

    Raises:
        UsageError: it is another one; the message says what to do.
    """
    name, now, then = embedder.name, getattr(embedder, "digest", ""), getattr(index, "embedder_digest", "")
    if now == then if now and then else Path(name).name == Path(index.embedder).name:
        return
    if name != index.embedder:
        raise UsageError(
            f"{where} was built with the embedder {index.embedder!r}, not with {name!r}: give {option} "
            f"{index.embedder!r}, not {name!r}, or curate again"
        )
    raise UsageError(
        f"{where} was built with other weights or settings of {name!r} (digest {then[:12]}, now {now[:12]}): give "
        f"{option} those, or curate again"
    )


def index_folder(where: str | Path) -> Path:
    """The local folder of an index, or of the copy of one at a URL; see :meth:`TrainingIndex.load`."""
    place = Store(str(where))
    inner = "" if place.has("index.json") else "index/"
    for name in reversed(FILES):
        if not place.has(inner + name):
            raise UserError(f"no index in {place}: {name} is missing; `curate dedup` writes one")
    return place.local_folder([inner + name for name in FILES])


def _merge(best: Tensor, best_rows: Tensor, similarity: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """The best ``k`` of each line of what was found before and of a block of rows from number ``start``, sorted by
    similarity, then by row.
    """
    import torch

    if best.shape[1] == k:
        least = best[:, -1:]
    else:
        least = similarity.topk(min(k, similarity.shape[1])).values[:, -1:]
    # All that tie with the k-th come along, or the choice among equals would be arbitrary. The stable sort leaves
    # equals in the order of their rows: earlier blocks stand before, and within a block columns ascend. What is no
    # number is not less, and stays to be seen.
    columns = (~(similarity < least)).any(0).nonzero()[:, 0]
    best = torch.cat([best, similarity[:, columns]], 1)
    best_rows = torch.cat([best_rows, (columns + start).expand(len(best), -1)], 1)
    best, order = best.sort(dim=1, descending=True, stable=True)
    return best[:, :k], best_rows.gather(1, order[:, :k])


@contextmanager
def _float32_products(device: str) -> Iterator[None]:
    """Full float32 in matrix products, whatever the process or an autocast around it chose: nearest rows are exact."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

