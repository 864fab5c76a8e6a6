"""The greedy rule for many rows at a time: an image is kept where none near it is preferred or still open.

What a first pass keeps drops what is near, which opens the way for others: a few rounds over arrays decide what going
through the rows one by one would, but where chains are long; there, images are gone through.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from curate.decisions.parts import AtThreshold, things
from curate.decisions.settled import CODE, EXACT_IMAGE, NEAR_IMAGE, NEAR_PAIR, Settled
from curate.neighbors.verify import Crowd, Pairs

AHEAD = 256  # crowded images that are looked up at a time
_ROUNDS = 32
_STAND_INS = 1 << 22  # that are weighed at a time
_CROWDED = 2048  # crowded rows for which they are, at most


def settle(near: AtThreshold, rank: NDArray[np.integer], judged: NDArray[np.bool_]) -> Settled:
    """As :meth:`curate.decisions.judge.Judge.greedy` has it, of one copy, where captions that differ are pooled, no
    caption has a quota, and no list keeps any row.

    Args:
        near: of n rows.
        rank: ``[n]``, the preferred rows first; each its own.
        judged: ``[n]``; of the others nothing is decided.
    """
    settled, images = Settled.kept(len(rank)), things(near.image_of, near.image_pairs)
    rows = np.flatnonzero(judged)
    rows = rows[np.argsort(rank[rows])]
    first = np.full(images, -1, np.int64)  # of each image's rows that are judged
    first[near.image_of[rows[::-1]]] = rows[::-1]
    there = (first[near.image_pairs.i] >= 0) & (first[near.image_pairs.j] >= 0)
    a, b, similarity = near.image_pairs.i[there], near.image_pairs.j[there], near.image_pairs.similarity[there]
    swapped = rank[first[a]] > rank[first[b]]
    a, b = np.where(swapped, b, a), np.where(swapped, a, b)
    crowd, of_first = near.image_pairs.crowd, rank[first]
    if crowd is None:
        kept = ~_dropped(a, b, images, of_first)
    else:
        crowded = np.flatnonzero(first[crowd.rows] >= 0)  # places in the crowd
        kept = ~_dropped_beside_crowd(a, b, of_first, first >= 0, crowd, crowded)
    del of_first

    # Of a kept image the first row stands for all others.
    image = near.image_of[rows]
    same = kept[image] & (first[image] != rows)
    _drop(settled, near, rows[same], first[image[same]], np.ones(int(same.sum()), np.float32))

    # For a dropped one the nearest kept image does, an equal caption first, that was kept before the row was judged.
    a, b = np.concatenate([a, b]), np.concatenate([b, a])
    of_kept = kept[a] & ~kept[b]
    a, b, similarity = a[of_kept], b[of_kept], np.tile(similarity, 2)[of_kept]
    by_image = np.argsort(b, kind="stable")
    a, b, similarity = a[by_image], b[by_image], similarity[by_image]
    rows = rows[~kept[image]]
    rows = rows[np.argsort(near.image_of[rows], kind="stable")]
    for some, stand_in, of_image, likeness in _kept_near(rows, near, (a, b, similarity), kept, first >= 0):
        starts, stops = (np.searchsorted(of_image, near.image_of[some], side=side) for side in ("left", "right"))
        sizes = stops - starts
        row, at = np.repeat(some, sizes), np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        before = rank[first[stand_in[at]]] < rank[row]
        row, at = row[before], at[before]
        _drop(settled, near, row, first[stand_in[at]], likeness[at], rank)
    return settled


def _kept_near(
    rows: NDArray[np.int64],
    near: AtThreshold,
    pairs: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]],
    kept: NDArray[np.bool_],
    there: NDArray[np.bool_],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """What is kept near the images of dropped ``rows``, some rows at a time.

    Args:
        rows: by their images, which ascend.
        near: of all rows.
        pairs: ``a, b, similarity``: kept images, dropped ones, which ascend, and their cosines; not those of two
            crowded ones, which are asked for here.
        kept, there: of each image, whether it is kept, and judged.

    Yields:
        ``rows, a, b, similarity``: some of the rows, and all pairs of their images.
    """
    crowd, (a, b, similarity) = near.image_pairs.crowd, pairs
    image = near.image_of[rows]
    weights = np.searchsorted(b, image, side="right") - np.searchsorted(b, image)
    if crowd is not None:
        place, of_crowd = np.full(len(kept), -1, np.int64), np.arange(len(crowd.rows))
        place[crowd.rows] = of_crowd
        weights[place[image] >= 0] += _STAND_INS // _CROWDED
        of_crowd = of_crowd[(kept & there)[crowd.rows]]
    weights = np.cumsum(weights)
    for some in np.split(rows, np.searchsorted(weights, np.arange(_STAND_INS, weights.max(initial=0), _STAND_INS))):
        if not len(some):
            continue
        image = near.image_of[some]
        at = slice(np.searchsorted(b, image[0]), np.searchsorted(b, image[-1], side="right"))
        found = [(a[at], b[at], similarity[at])]
        if crowd is not None and len(asked := np.unique(place[image[place[image] >= 0]])):
            more = crowd.pairs_among(asked, of_crowd)
            found.append((crowd.rows[more.j], crowd.rows[more.i], more.similarity))
        one, other, likeness = (np.concatenate(column) for column in zip(*found, strict=True))
        by_image = np.argsort(other, kind="stable")
        yield some, one[by_image], other[by_image], likeness[by_image]


def _dropped(a: NDArray[np.int64], b: NDArray[np.int64], n: int, rank: NDArray[np.integer]) -> NDArray[np.bool_]:
    """``[n]``: which images a kept one is near to; of each pair ``a`` is preferred to ``b``."""
    dropped, waits = np.zeros(n, bool), np.zeros(n, bool)
    for _ in range(_ROUNDS):
        if not len(a):
            return dropped
        waits[b] = True
        dropped[b[~waits[a]]] = True
        waits[b] = False
        still = ~dropped[a] & ~dropped[b]
        a, b = a[still], b[still]
    order = np.lexsort((b, rank[a]))
    for one, other in zip(a[order].tolist(), b[order].tolist(), strict=True):
        if not dropped[one]:
            dropped[other] = True
    return dropped


def _dropped_beside_crowd(
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    rank: NDArray[np.integer],
    there: NDArray[np.bool_],
    crowd: Crowd,
    crowded: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """``[n]``: likewise where pairs of ``crowded`` places in a crowd are to be asked for. Some images are gone through
    at a time, the preferred ones first: crowded ones are held against those that were kept before them.
    """
    dropped = np.zeros(len(rank), bool)
    place = np.full(len(rank), -1, np.int64)
    place[crowd.rows[crowded]] = crowded
    by_rank = np.argsort(rank[a], kind="stable")
    b = b[by_rank]
    order = np.flatnonzero(there)
    order = order[np.argsort(rank[order])]
    of_a = rank[a][by_rank]
    starts, stops = (np.searchsorted(of_a, rank[order], side=side).data for side in ("left", "right"))
    cuts = np.append(np.flatnonzero(place[order] >= 0)[::AHEAD], len(order)).tolist()
    held = np.empty(0, np.int64)  # crowded ones that were kept
    for start, stop in zip([0, *cuts[:-1]], cuts, strict=True):
        some = order[start:stop]
        asked = place[some[(place[some] >= 0) & ~dropped[some]]]
        dropped[crowd.rows[crowd.pairs_among(asked, held).i]] = True
        asked = asked[~dropped[crowd.rows[asked]]]
        among = crowd.pairs_among(asked, asked)
        near = {int(one): crowd.rows[others] for one, others in _grouped(crowd.rows[among.i], among.j)}
        for at, image in enumerate(some.tolist(), start):
            if not dropped[image]:
                dropped[b[starts[at] : stops[at]]] = True
                if image in near:
                    dropped[near[image][rank[near[image]] > rank[image]]] = True
        held = np.concatenate([held, asked[~dropped[crowd.rows[asked]]]])
    return dropped


def _grouped(keys: NDArray[np.int64], values: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """The values of each key."""
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    return list(zip(distinct.tolist(), np.split(values[order], starts[1:]), strict=True)) if len(distinct) else []


def _drop(
    settled: Settled,
    near: AtThreshold,
    row: NDArray[np.int64],
    kept: NDArray[np.int64],
    similarity: NDArray[np.float32],
    rank: NDArray[np.integer] | None = None,
) -> None:
    """Drop rows, each for the best of the kept ones that are named for it, of images so similar.

    Without ``rank`` one is named for each, that shows the same image.
    """
    of_captions = similarities(near.caption_pairs, near.caption_of[row], near.caption_of[kept])
    if rank is not None:
        best = np.lexsort((rank[kept], -similarity, np.isnan(of_captions), row))
        best = best[np.unique(row[best], return_index=True)[1]]
        row, kept, similarity, of_captions = row[best], kept[best], similarity[best], of_captions[best]
        settled.reason[row] = np.where(np.isnan(of_captions), CODE[NEAR_IMAGE], CODE[NEAR_PAIR])
    else:
        settled.reason[row] = CODE[EXACT_IMAGE]
    settled.kept_by[row] = settled.group[row] = kept
    settled.image_similarity[row], settled.caption_similarity[row] = similarity, of_captions


def similarities(pairs: Pairs, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float32]:
    """``[m]``: of things ``a`` and ``b``: 1 for one thing, NaN for what is not near."""
    found = np.where(a == b, np.float32(1), np.float32(np.nan)).astype(np.float32)
    low, high = np.minimum(a, b), np.maximum(a, b)
    if len(pairs):
        at = pairs.places(low, high)
        found[at >= 0] = pairs.similarity[at[at >= 0]]
    if (crowd := pairs.crowd) is not None:
        one, other = (np.minimum(np.searchsorted(crowd.rows, side), len(crowd.rows) - 1) for side in (low, high))
        both = (low != high) & (crowd.rows[one] == low) & (crowd.rows[other] == high)
        found[both] = crowd.similarities(one[both], other[both])
    return found
