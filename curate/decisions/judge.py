"""One row after the other, in the order of preference: each against what was kept before it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from curate.decisions.neighbours import Kept, Neighbours
from curate.decisions.parts import Near, things
from curate.decisions.settled import (
    CAPTION_QUOTA,
    CODE,
    EXACT_IMAGE,
    NEAR_CAPTION,
    NEAR_IMAGE,
    NEAR_PAIR,
    OWN_RULE,
    Settled,
)

FEW = 16  # copies that are all looked at, whatever their captions


class Judge:
    """The state of one decision: the verdicts so far, and who was kept of which image and caption.

    Time grows with the rows and their near pairs alone, but for a crowd (:class:`~curate.neighbors.verify.Crowd`) of
    which many are kept beside each other (``keep`` under captions that all differ): each is compared with all of these.
    """

    def __init__(
        self,
        near: Near,
        captioned: NDArray[np.bool_],
        order: NDArray[np.integer],
        keep_copies: int,
        max_per_caption: int | None,
        keep_differing: bool,
        must_stay: NDArray[np.bool_],
    ):
        n = len(near.image_of)
        self.captioned = captioned.data
        self.keep_copies, self.max_per_caption, self.keep_differing = keep_copies, max_per_caption, keep_differing
        # Memory views give Python's numbers as lists do, without holding them.
        self.image_of, self.caption_of = near.image_of.data, near.caption_of.data
        number = np.int32 if n < 1 << 31 else np.int64
        self.images = Neighbours(near.image_pairs, things(near.image_of, near.image_pairs), n)
        self.texts = Neighbours(near.caption_pairs, things(near.caption_of, near.caption_pairs), n)
        ranks = np.empty(n, number)
        ranks[order] = np.arange(len(order), dtype=number)
        self.rank = ranks.data
        if max_per_caption is None:  # then a row whose image stands alone is kept, and decides nothing for others
            order = order[self.images.has_company(near.image_of)[order]]
        self.order = order.data
        self.images.will_be_asked(near.image_of, order)
        self.texts.will_be_asked(near.caption_of, order)
        self.must_stay = must_stay
        start = Settled.kept(n)
        self.reason, self.kept_by, self.group = start.reason, start.kept_by, start.group
        self.image_similarity, self.caption_similarity = start.image_similarity, start.caption_similarity

    # --------------------------------------------------------------------------------------------- the rules

    def greedy(self) -> None:
        """Each row against the rows kept before it."""
        for row in self.order:
            image = self.image_of[row]
            if near := self.images.kept_things_near(image):
                if self._drop_as_copy(row, self._copies(row, near)):
                    self.group[row] = self.group[self.kept_by[row]]
                    continue
                # Kept for its caption: still one image with the nearest copy, of equals the preferred one.
                first = [(thing != image, -similarity, self.images.kept.first(thing)) for thing, similarity in near]
                self.group[row] = self.group[min(first, key=lambda c: (c[0], c[1], self.rank[c[2]]))[2]]
            self._keep_within_quota(row)

    def components(self) -> None:
        """All rows that near pairs link are one group; its first row stands for it."""
        root = self.images.components()
        first = np.full(len(root), -1, np.int64)  # by component
        kept = Kept(len(root), len(self.reason))
        for row in self.order:
            component = int(root[self.image_of[row]])
            if first[component] < 0:
                first[component] = row
            self.group[row] = first[component]
            if first[component] != row:
                of_component = kept.of(component)
                if self._only_alike(row, len(of_component)):
                    alike = self.texts.kept_near(self.caption_of[row])
                    of_component = [other for other, _ in alike if root[self.image_of[other]] == component]
                copies = [(other, self._image_similarity(row, other)) for other in of_component]
                if self._drop_as_copy(row, copies):
                    continue
            if self._keep_within_quota(row):
                kept.add(component, row)

    def by_stand_ins(self, stand_in: NDArray[np.int64], order: NDArray[np.integer]) -> None:
        """As somebody else decided: ``stand_in`` ``[n]`` is a kept row for each that is dropped, -1 for the others."""
        for row in order[stand_in[order] >= 0].tolist():
            kept = int(stand_in[row])
            of_images, of_captions = self._image_similarity(row, kept), self._caption_similarity(row, kept)
            if not math.isnan(of_images):
                self._drop_for_its_image(row, kept, of_images, of_captions)
                self.group[row] = kept
            elif self.caption_of[kept] == self.caption_of[row]:
                self._drop(row, kept, CAPTION_QUOTA, of_images, of_captions)
            else:
                self._drop(row, kept, OWN_RULE if math.isnan(of_captions) else NEAR_CAPTION, of_images, of_captions)

    # --------------------------------------------------------------------------------------------- the steps

    def _copies(self, row: int, near: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """``(row, similarity)`` of what was kept of the images ``near``; of many, what may decide about ``row``."""
        if self._only_alike(row, sum(len(self.images.kept.of(thing)) for thing, _ in near)):
            similarity, alike = dict(near), self.texts.kept_near(self.caption_of[row])
            return [(kept, similarity[image]) for kept, _ in alike if (image := self.image_of[kept]) in similarity]
        return [(kept, similarity) for thing, similarity in near for kept in self.images.kept.of(thing)]

    def _only_alike(self, row: int, copies: int) -> bool:
        """Whether of so many copies only those with a caption near that of ``row`` are to be looked at: where captions
        that differ keep a copy, a thousand copies of one image would each be compared with all before it.
        """
        return self.keep_differing and copies > FEW and self._has_caption(row)

    def _drop_as_copy(self, row: int, copies: list[tuple[int, float]]) -> bool:
        """Drop ``row`` for one of the kept ``copies``, unless its caption or a list forbids; whether it did."""
        if self.must_stay[row]:
            return False
        with_caption = [(kept, similarity, self._caption_similarity(row, kept)) for kept, similarity in copies]
        if self.keep_differing:
            with_caption = [c for c in with_caption if not math.isnan(c[2]) or not self._has_caption(row)]
        if len(with_caption) < self.keep_copies:  # which is at least 1
            return False
        kept, similarity, of_captions = min(
            with_caption,
            key=lambda c: (
                self.image_of[c[0]] != self.image_of[row],
                math.isnan(c[2]),
                1.0 if math.isnan(c[1]) else -c[1],
                self.rank[c[0]],
            ),
        )
        self._drop_for_its_image(row, kept, similarity, of_captions)
        return True

    def _drop_for_its_image(self, row: int, kept: int, similarity: float, of_captions: float) -> None:
        if self.image_of[kept] == self.image_of[row]:
            reason = EXACT_IMAGE
        else:
            reason = NEAR_IMAGE if math.isnan(of_captions) else NEAR_PAIR
        self._drop(row, kept, reason, similarity, of_captions)

    def _keep_within_quota(self, row: int) -> bool:
        """Keep ``row``, unless enough kept rows have its caption; whether it was kept."""
        caption = self.caption_of[row]
        if self.max_per_caption is not None and self._has_caption(row) and not self.must_stay[row]:
            same = self.texts.kept_near(caption)
            if len(same) >= self.max_per_caption:
                kept, similarity = min(same, key=lambda c: (self.caption_of[c[0]] != caption, -c[1], self.rank[c[0]]))
                reason = CAPTION_QUOTA if self.caption_of[kept] == caption else NEAR_CAPTION
                self._drop(row, kept, reason, self._image_similarity(row, kept), similarity)
                return False
        self.images.keep(self.image_of[row], row)
        if self.max_per_caption is not None or self.keep_differing:  # else nobody asks
            self.texts.keep(caption, row)
        return True

    def _drop(self, row: int, kept: int, reason: str, image: float, caption: float) -> None:
        self.reason[row], self.kept_by[row] = CODE[reason], kept
        self.image_similarity[row], self.caption_similarity[row] = image, caption

    def _has_caption(self, row: int) -> bool:
        return bool(self.captioned[row])

    def _image_similarity(self, a: int, b: int) -> float:
        return self.images.similarity(self.image_of[a], self.image_of[b])

    def _caption_similarity(self, a: int, b: int) -> float:
        return self.texts.similarity(self.caption_of[a], self.caption_of[b])

    def settled(self) -> Settled:
        """What was decided."""
        return Settled(self.reason, self.kept_by, self.image_similarity, self.caption_similarity, self.group)
