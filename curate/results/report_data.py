"""What the report of a curation shows: the largest groups, pairs around the threshold, and their thumbnails."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afresh.errors import UserError
from afresh.storage import Store
from curate.neighbors.brute_force import in_blocks, nearest
from curate.results.ledger import DROPPED, KEPT

if TYPE_CHECKING:
    from numpy.typing import NDArray


PICTURES = "work/report.json"
GROUPS_SHOWN = 24
DROPPED_SHOWN = 7  # of one group: with the kept one, a line
CLOSE_CALLS_SHOWN = 12  # on each side of the threshold
CLOSE_CALLS_AMONG = 200  # on each side, at least, what those that are shown are drawn from
BLOCK = 1 << 20  # pairs that are looked at at a time
CLOSE = 0.01  # in large sets everything that is no farther from the threshold
THUMBNAIL_PIXELS = 112
BINS = 50


@dataclass(frozen=True)
class Pictures:
    """What the report shows and neither summary nor ledger holds.

    Attributes:
        histogram: ``counts`` of similarities in BINS equal bins over [0, 1]; of how many ``images``.
        close_calls: (row, row, similarity) of random image pairs near the threshold, on both sides of it.
        thumbnails: encoded images by ledger row.
    """

    histogram: Mapping[str, Any]
    close_calls: Sequence[tuple[int, int, float]]
    thumbnails: Mapping[int, bytes]

    def save(self, out: Store) -> None:
        """Write ``work/report.json``."""
        thumbnails = {
            str(row): base64.b64encode(data).decode() for row, data in sorted(self.thumbnails.items())
        }
        calls = [[a, b, similarity] for a, b, similarity in self.close_calls]
        out.write_json(PICTURES, {"histogram": self.histogram, "close_calls": calls, "thumbnails": thumbnails})

    @classmethod
    def load(cls, out: Store) -> Pictures:
        """Read what ``save`` wrote. Raises ``UserError`` when it is missing or damaged."""
        try:
            stored = json.loads(out.read(PICTURES))
            return cls(
                histogram=stored["histogram"],
                close_calls=[(int(a), int(b), float(s)) for a, b, s in stored["close_calls"]],
                thumbnails={int(row): base64.b64decode(data) for row, data in stored["thumbnails"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{out.at(PICTURES)}: missing or damaged; run `curate dedup` again, it continues there"
            ) from error


def gallery(table: pa.Table) -> list[list[int]]:
    """Ledger rows of the largest groups, largest first; in each the kept rows, then the dropped ones.

    Of the dropped rows those come first whose likeness is least sure: by similarity, exact copies last.
    """
    size = table["group_size"].fill_null(0).to_numpy()
    # Of each size there are rows by that many; what is smaller than the smallest that may be shown is not looked at.
    groups = (rows := np.bincount(size))[2:] // np.arange(2, len(rows))
    smallest = 2 + int(np.count_nonzero(np.cumsum(groups[::-1])[::-1] >= GROUPS_SHOWN)) - 1
    large = size >= max(2, smallest)
    members, size, group = np.flatnonzero(large), size[large], table["group"].filter(pa.array(large)).to_numpy()
    numbers, first = np.unique(group, return_index=True)
    shown = numbers[np.lexsort((numbers, -size[first]))][:GROUPS_SHOWN]
    of_shown = np.isin(group, shown)
    members, group = members[of_shown], group[of_shown]

    kept, dropped, exact = (
        pc.equal(table[column], value).fill_null(False).to_numpy()[members]
        for column, value in (("status", KEPT), ("status", DROPPED), ("reason", "exact_image"))
    )
    similarity = table["image_similarity"].fill_null(1.0).to_numpy()[members]
    order = np.lexsort((members, similarity, exact, dropped))
    members, group, kept, dropped = members[order], group[order], kept[order], dropped[order]
    result = []
    for number in shown:
        inside = group == number
        chosen = [members[inside & of_status][:DROPPED_SHOWN].tolist() for of_status in (kept, dropped)]
        result.append(chosen[0] + chosen[1])
    return result


def nearest_similarities(
    embeddings: NDArray[np.float16], sample: int, seed: int, block: int = 1 << 11
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Nearest other row of a random sample of rows, by exact search.

    Args:
        embeddings: [n, dim] unit rows, n ≥ 2.
        sample: how many rows to ask for (all, when there are fewer).
        seed: of the choice.
        block: rows compared at a time.

    Returns:
        Rows asked for (sorted), nearest row of each, cosine similarity (float32); each [min(sample, n)].
    """
    count = len(embeddings)
    asked = np.sort(np.random.default_rng(seed).choice(count, min(sample, count), replace=False))

    def hide(start: int, similarity: NDArray[np.float32]) -> None:
        inside = (asked >= start) & (asked < start + similarity.shape[1])
        similarity[inside, asked[inside] - start] = -np.inf  # a row with itself

    cosine, row = nearest(embeddings[asked].astype(np.float32), in_blocks(embeddings, block), hide=hide)
    return asked, row[:, 0], cosine[:, 0]


def histogram(similarities: NDArray[np.float32]) -> dict[str, Any]:
    """Counts of similarities in BINS equal bins over [0, 1]; what lies outside counts in the end bins."""
    counts, _ = np.histogram(np.clip(similarities, 0.0, 1.0), bins=BINS, range=(0.0, 1.0))
    return {"counts": counts.tolist(), "images": len(similarities)}


def around(similarities: NDArray[np.float32], threshold: float) -> NDArray[np.int64]:
    """The places that :func:`close_calls` needs to see, ascending; ``similarities`` may be a memory map."""
    reaches = CLOSE_CALLS_AMONG * 2  # a pair may be given from both its sides
    low, cut, high = np.array([threshold - CLOSE, threshold, threshold + CLOSE], np.float32)
    nearest: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * 2  # below and above
    blocks = [slice(start, start + BLOCK) for start in range(0, len(similarities), BLOCK)]
    for some in blocks:
        block = similarities[some]
        below, above = np.sort(np.append(nearest[0], block[block < cut])), np.append(nearest[1], block[block >= cut])
        nearest = [below[-reaches:], np.sort(above)[:reaches]]
    low = min([low, *nearest[0][:1]])
    high = max([high, *nearest[1][-1:]])
    found = [some.start + np.flatnonzero((similarities[some] >= low) & (similarities[some] <= high)) for some in blocks]
    return np.concatenate([np.empty(0, np.int64), *found])


def close_calls(
    rows: NDArray[np.int64],
    others: NDArray[np.int64],
    similarities: NDArray[np.float32],
    threshold: float,
    seed: int = 0,
) -> list[tuple[int, int, float]]:
    """Random pairs just below and just above the threshold, up to CLOSE_CALLS_SHOWN each, by similarity.

    Of each side those within CLOSE of the threshold are drawn from, and at least the CLOSE_CALLS_AMONG nearest to it:
    what is seen is what a small change of the threshold would move.

    Args:
        rows, others, similarities: pairs around the threshold, each ``[m]``.
        threshold: at or above it pairs are near.
        seed: of the choice.
    """
    low, high = np.minimum(rows, others), np.maximum(rows, others)
    order = np.lexsort((high, low, similarities))
    low, high, similarities = low[order], high[order], similarities[order]
    fresh = np.ones(len(low), bool)  # a pair may be given from both its sides
    fresh[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    low, high, similarities = low[fresh], high[fresh], similarities[fresh]
    around = np.array([threshold - CLOSE, threshold, threshold + CLOSE], np.float32)
    start, cut, stop = (int(place) for place in np.searchsorted(similarities, around))
    rng, shown = np.random.default_rng(seed), list[tuple[int, int, float]]()
    for first, last in (
        (max(0, min(start, cut - CLOSE_CALLS_AMONG)), cut),
        (cut, min(len(low), max(stop, cut + CLOSE_CALLS_AMONG))),
    ):
        places = first + np.sort(rng.choice(last - first, min(CLOSE_CALLS_SHOWN, last - first), replace=False))
        shown += zip(low[places].tolist(), high[places].tolist(), similarities[places].tolist(), strict=True)
    return shown


def thumbnail(data: bytes, *, max_pixels: int = 64_000_000) -> bytes:
    """A small WebP of an encoded image. Raises :class:`curate.reading.images.ImageError`."""
    import io

    from PIL import Image

    from curate.reading.images import decode_image

    image = decode_image(data, max_pixels=max_pixels)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()

