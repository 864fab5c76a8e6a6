"""Views of an index: the same training images as other embedders see them, each on its own scale.

A sampler that follows one embedder can leave a copy that this one no longer sees. So an index has views that have
little in common: a second embedder of objects, luminance, edges, colour. Each is a :class:`TrainingIndex` of the kept
images, calibrated on their nearest neighbours that are no copies, and lies in ``OUT/views/NAME`` beside the shards that
it was made from, or in the user's cache folder where that cannot be written to. They are made when a sampler first
asks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from afresh.errors import UserError
from afresh.progress import get_logger, progress
from afresh.storage import cache_folder
from curate.index.calibration import Calibration, nearest_distinct, without_twins
from curate.index.training_index import TrainingIndex, index_folder

if TYPE_CHECKING:
    from PIL.Image import Image

    from curate.embed.protocol import Embedder

log = get_logger(__name__)
OBJECTS, PIXELS = "copy-detector", ("luminance", "edges", "chroma")
BATCH = 256
_EXPECTED = 0.01  # the share of images that are no copies and lie above 0.5


def views_of(where: str, index: TrainingIndex) -> list[tuple[TrainingIndex, Embedder]]:
    """The views of the index in the output folder of ``curate dedup``, each with its embedder; made where missing.

    Args:
        where: the output folder, or its index folder.
        index: the index itself.

    Returns:
        None of them where the kept images are not at hand: an index alone, at a URL, or beside other shards.
    """
    from curate.embed.registry import load_embedder

    out = index_folder(where).parent
    names = [name for name in (OBJECTS, *PIXELS) if name != index.embedder]
    if "://" in where or not (out / "shards").is_dir():
        log.warning(f"{where}: the images of its shards are not at hand, so there are no views beside {index.embedder}")
        return []
    embedders = [load_embedder(name) for name in names]
    folders = [_folder(out, index, embedder) for embedder in embedders]
    missing = [(e, f) for e, f in zip(embedders, folders, strict=True) if not (f / "index.json").is_file()]
    if missing:
        made = build_views(index, kept_images(out), [embedder for embedder, _ in missing])
        for view, (_, folder) in zip(made, missing, strict=True):
            view.save(folder)
    return [(TrainingIndex.load(f), e) for e, f in zip(embedders, folders, strict=True)]


def kept_images(out: Path) -> Iterator[tuple[str, Image]]:
    """Key and image of each sample that curation kept, in the order of ``out/shards``."""
    from curate.reading.images import decode_image
    from curate.reading.samples import Sample, read_samples

    for shard in sorted((out / "shards").glob("*.tar")):
        for sample in read_samples(str(shard)):
            if isinstance(sample, Sample):
                yield sample.key, decode_image(sample.image)


def build_views(
    index: TrainingIndex, images: Iterator[tuple[str, Image]], embedders: Sequence[Embedder]
) -> list[TrainingIndex]:
    """The kept rows of an index as other embedders see them, in memory.

    Args:
        index: it.
        images: key and image of each kept sample, in the order of the index's rows.
        embedders: one a view.

    Raises:
        UserError: the images are not those of the kept rows.
    """
    rows = np.flatnonzero(index.kept)
    keys: list[str] = []
    found: list[list[NDArray[np.float16]]] = [[] for _ in embedders]
    batch: list[Image] = []

    def look() -> None:
        for vectors, embedder in zip(found, embedders, strict=True):
            vectors.append(embedder.embed(batch).astype(np.float16))
        bar.update(len(batch))
        batch.clear()

    with progress(total=len(rows), desc="views of the index", unit="images") as bar:
        for key, image in images:
            keys.append(key)
            batch.append(image)
            if len(batch) == BATCH:
                look()
        if batch:
            look()
    if keys != [index.keys[row] for row in rows.tolist()]:
        raise UserError(
            f"the index has {len(rows)} kept rows, but its shards {len(keys)} images, or others: curate again"
        )
    every = np.ones(len(rows), bool)
    views = []
    for vectors, embedder in zip(found, embedders, strict=True):
        view = replace(
            index,
            embeddings=np.concatenate(vectors),
            captions=[index.captions[row] for row in rows.tolist()],
            shards=[index.shards[row] for row in rows.tolist()],
            keys=[index.keys[row] for row in rows.tolist()],
            kept=every,
            group=index.group[rows],
            embedder=embedder.name,
            embedder_digest=embedder.digest,
        )
        others = without_twins(nearest_distinct(view.embeddings, every, view.group))
        views.append(replace(view, calibration=strict(others)))
    return views


def strict(cosines: NDArray[np.floating]) -> Calibration:
    """The calibration of a view: 0.5 lies at the 99 % quantile, or where the law of the other rows has it, if lower.

    In a set of some hundred images the 99 % quantile is that of two or three pairs, which may be look-alikes: with it
    alone a copy of another contrast would be none. The law is that of :func:`~curate.index.calibration.without_twins`.

    Args:
        cosines: ``[n]`` of nearest neighbours that are no copies.
    """
    fitted = Calibration.fit(cosines)
    if len(cosines) < 2:
        return fitted
    distances = np.log(np.maximum(1 - np.asarray(cosines, np.float64), 1e-6))
    nearest, middle = np.quantile(distances, (0.1, 0.5))
    tenth, half, wanted = np.log(-np.log1p(-np.array([0.1, 0.5, _EXPECTED])))
    expected = 1 - float(np.exp(nearest - (middle - nearest) * (tenth - wanted) / (half - tenth)))
    anchors = list(fitted.cosine)
    anchors[3] = round(max(min(anchors[3], expected), anchors[2] + 1e-3), 6)
    return Calibration(tuple(anchors), fitted.value)


def _folder(out: Path, index: TrainingIndex, embedder: Embedder) -> Path:
    """Where a view lies: one of other rows, or of another embedder's weights, lies elsewhere."""
    digest = hashlib.sha256(f"{index.digest} {embedder.digest}".encode()).hexdigest()[:12]
    name = f"{embedder.name}-{digest}"
    beside = out / "views" / name
    if (beside / "index.json").is_file() or os.access(out, os.W_OK):
        return beside
    return cache_folder() / "views" / name
