"""Sets of rows that can be decided about apart: all that near pairs link, however long the chain, is in one part.

A row stands in nobody's way that it is not linked with. So verdicts need the pairs of one part at a time; the pairs of
the whole set may be memory maps. Numbers inside a part ascend as those of the set do: what is decided is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from curate.neighbors.components import linked
from curate.neighbors.verify import Pairs

PART = 1 << 18  # rows and pairs of a part, unless more are linked
_LINKS = 1 << 20  # pairs that are looked at at a time, or a fourth of what they link


class Near(Protocol):
    """What is near what, among n rows."""

    @property
    def image_of(self) -> NDArray[np.int64]:
        """``[n]``: number of each row's distinct image, 0 … images - 1."""

    @property
    def image_pairs(self) -> Pairs:
        """Near pairs of distinct images."""

    @property
    def caption_of(self) -> NDArray[np.int64]:
        """``[n]``: number of each row's distinct normalised caption, 0 … captions - 1."""

    @property
    def caption_pairs(self) -> Pairs:
        """Near pairs of distinct captions; captions too short to compare have none."""


@dataclass(frozen=True)
class AtThreshold:
    """What is near what among n rows: a :class:`Near` as arrays, its pairs those above the threshold in force."""

    image_of: NDArray[np.int64]
    image_pairs: Pairs
    caption_of: NDArray[np.int64]
    caption_pairs: Pairs


@dataclass(frozen=True)
class Part:
    """Some of the rows, and what is near what among them.

    Attributes:
        rows: int64 ``[m]``, ascending, their numbers in the set.
        near: of these rows, images and captions, by their places here.
        by_hand: whether rows are among them that are to be apart.
    """

    rows: NDArray[np.int64]
    near: AtThreshold
    by_hand: bool


def things(of_rows: NDArray[np.int64], pairs: Pairs) -> int:
    """How many numbers stand for images or captions."""
    return 1 + int(max(numbers.max(initial=-1) for numbers in (of_rows, pairs.j)))


def parts_of(near: Near, *, by_captions: bool, apart: NDArray[np.bool_]) -> Iterator[Part]:
    """All parts of more than one row, of about ``PART`` rows and pairs each.

    Args:
        near: what is near what, down to the lowest threshold that matters.
        by_captions: whether equal and near captions link rows as images do.
        apart: ``[n]``, rows that are to be in parts of their own, with what they are linked with.
    """
    images = things(near.image_of, near.image_pairs)
    nodes = images + by_captions * things(near.caption_of, near.caption_pairs)
    label = _several(linked(_links(near, images, by_captions), nodes), near.image_of)
    parts, part_of = _numbered_parts(label, near, apart)
    members = _by_part(part_of[label[near.image_of]], len(parts))
    images_of = _by_part(part_of[label[:images]], len(parts))
    del label, part_of
    for hand, some, shown in zip(parts, members, images_of, strict=True):
        captions, caption_of = np.unique(near.caption_of[some], return_inverse=True)
        yield Part(
            some,
            AtThreshold(
                np.searchsorted(shown, near.image_of[some]),
                near.image_pairs.among(shown),
                caption_of,
                near.caption_pairs.among(captions),
            ),
            hand,
        )


def _several(root: NDArray[np.integer], image_of: NDArray[np.int64]) -> NDArray[np.integer]:
    """``[nodes]``: number of what each is linked with, where more than one row is; -1 where there is one alone."""
    several = np.bincount(root[image_of], minlength=len(root)) > 1
    number = np.full(len(root), -1, root.dtype)
    number[several] = np.arange(np.count_nonzero(several), dtype=root.dtype)
    return number[root]


def _numbered_parts(
    label: NDArray[np.integer], near: Near, apart: NDArray[np.bool_]
) -> tuple[list[bool], NDArray[np.int32]]:
    """For each part whether it is by hand; and in which part each label is, its last entry being -1, for -1."""
    labels = 1 + int(label.max(initial=-1))
    of_rows = label[near.image_of]
    weight = np.bincount(of_rows[of_rows >= 0], minlength=labels)
    by_hand = np.zeros(labels + 1, bool)
    by_hand[of_rows[apart]] = True
    for i, _ in _blocks(near.image_pairs, len(label)):
        of_pairs = label[i]
        weight += np.bincount(of_pairs[of_pairs >= 0], minlength=labels)
    part_of = np.full(labels + 1, -1, np.int32)
    parts: list[bool] = []
    for hand in (False, True):
        some = np.flatnonzero(by_hand[:-1] == hand)
        if len(some):
            cut = (np.cumsum(weight[some]) - weight[some]) // PART
            part_of[some] = len(parts) + np.unique(cut, return_inverse=True)[1]
            parts += [hand] * (int(part_of[some[-1]]) + 1 - len(parts))
    return parts, part_of


def _blocks(pairs: Pairs, nodes: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    step = max(_LINKS, nodes // 4)
    for start in range(0, len(pairs), step):
        yield pairs.i[start : start + step], pairs.j[start : start + step]


def _links(near: Near, images: int, by_captions: bool) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """What links images, numbered from 0, and captions, numbered from ``images`` on; a crowd is taken for one group."""
    for pairs, first in ((near.image_pairs, 0), (near.caption_pairs, images))[: 1 + by_captions]:
        for i, j in _blocks(pairs, images):
            yield i + first, j + first
        if pairs.crowd is not None:
            yield pairs.crowd.rows[:-1] + first, pairs.crowd.rows[1:] + first
    if by_captions:
        yield near.image_of, near.caption_of + images


def _by_part(part_of: NDArray[np.int32], parts: int) -> Iterator[NDArray[np.int64]]:
    """The places of each part, ascending."""
    there = np.flatnonzero(part_of >= 0).astype(np.int32 if len(part_of) < 1 << 31 else np.int64)
    there = there[np.argsort(part_of[there], kind="stable")]
    cuts = np.searchsorted(part_of[there], np.arange(1, parts))
    return (some.astype(np.int64) for some in np.split(there, cuts)) if parts else iter(())
