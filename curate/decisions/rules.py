"""From near pairs to verdicts: who is kept, and who stands for whom. Pure: arrays in, arrays out.

Rows are the readable samples in input order. Rows with equal pixels share an *image*, rows with equal
normalised captions share a *caption*; near pairs are between distinct images and between distinct captions,
so that a thousand copies of one placeholder cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from afresh.errors import UserError
from curate.decisions.neighbours import Neighbours
from curate.neighbors.verify import Pairs

Rule = Literal["greedy", "components"]
OnCaptionDiffers = Literal["pool", "keep"]
EXACT_IMAGE = "exact_image"  # the stand-in has the same pixels
NEAR_PAIR = "near_pair"  # image near, caption near
NEAR_IMAGE = "near_image"  # image near, caption another one (pooled, if there is one)
CAPTION_QUOTA = "caption_quota"  # another image, the same caption, and enough samples have it
NEAR_CAPTION = "near_caption"  # another image, a near caption, and enough samples have one like it
OTHER_SET = "other_set"  # the image, or a near one, stands in a set that was to be kept apart
EXCLUDED = "excluded"  # named in a list of samples to leave out
OWN_RULE = "own_rule"  # by a rule of the user's own, though neither image nor caption is near
OF_ITS_IMAGE = (EXACT_IMAGE, NEAR_PAIR, NEAR_IMAGE)  # the stand-in shows the same image, or a near one
FEW = 16  # copies that are all looked at, whatever their captions
REASONS = (EXACT_IMAGE, NEAR_PAIR, NEAR_IMAGE, CAPTION_QUOTA, NEAR_CAPTION, OTHER_SET, EXCLUDED, OWN_RULE)


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


class OwnRule(Protocol):
    """A rule of one's own: which row stands for which. A pure function, called for each threshold that is tried."""

    def __call__(self, near: AtThreshold, captions: Sequence[str], order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Decide.

        Args:
            near: all near pairs of images and of captions, none left out.
            captions: of each of the n rows, perhaps empty.
            order: the rows to judge, the preferred ones first. Those that a list or another set decides about are not
                among them.

        Returns:
            int64 ``[n]``: the kept row that stands for a dropped one, -1 for those that are kept.
        """
        ...


@dataclass(frozen=True)
class Verdicts:
    """One verdict a row.

    Attributes:
        kept: bool ``[n]``.
        reason: object ``[n]``, one of ``REASONS`` for a dropped row, None for a kept one.
        kept_by: int64 ``[n]``, the kept row that stands for a dropped one; -1 for a kept one, and for one that stands
            in another set or was excluded.
        image_similarity: float32 ``[n]``, cosine of a row with its stand-in, 1 for equal pixels; NaN where it
            is not known, because there is no stand-in or the two are no near pair.
        caption_similarity: float32 ``[n]``, likewise of the captions.
        group: int64 ``[n]``: rows that show one image have one group, named by its first member in the order
            of preference. A row dropped for its caption alone is its own image.
        group_size: int64 ``[n]``, rows in the row's group.
        pooled: the captions that a kept row inherits from dropped copies of its image, by kept row: those that differ
            from its own, and what the copies had beside theirs; distinct, in the order of preference.
    """

    kept: NDArray[np.bool_]
    reason: NDArray[np.object_]
    kept_by: NDArray[np.int64]
    image_similarity: NDArray[np.float32]
    caption_similarity: NDArray[np.float32]
    group: NDArray[np.int64]
    group_size: NDArray[np.int64]
    pooled: dict[int, list[str]]


def decide(
    near: Near,
    captions: Sequence[str],
    prefer: NDArray[np.int64] | None = None,
    *,
    threshold: float | None = None,
    rule: Rule | OwnRule = "greedy",
    keep_copies: int = 1,
    max_per_caption: int | None = None,
    on_caption_differs: OnCaptionDiffers = "pool",
    elsewhere: NDArray[np.bool_] | None = None,
    excluded: NDArray[np.bool_] | None = None,
    must_stay: NDArray[np.bool_] | None = None,
    others: Sequence[Sequence[str]] | None = None,
) -> Verdicts:
    """Keep or drop each row.

    Rows are judged in the order of preference. Under ``greedy`` a row is dropped if a row *already kept*
    shows its image or a near one, so its stand-in is a near-duplicate indeed, and a chain of near pairs
    swallows nothing. Under ``components`` all that is linked by near pairs is one group, and its first row
    stands for it, near or not. A copy under another caption (one that is neither equal nor near) is dropped
    and its caption pooled, or judged a sample of its own (``keep``). What shows an image of its own is then
    held against the caption quota.

    Time grows with the rows and their near pairs alone, but for a crowd (:class:`~curate.neighbors.verify.Crowd`) of
    which many are kept beside each other (``keep`` under captions that all differ): each is compared with all of these.

    Args:
        near: the joins.
        captions: of each row, as they are to be pooled; the empty one is never pooled.
        prefer: ``[n]`` rank of each row, least first; equal ranks go by input order, as all do without it.
        threshold: of images' similarity; near pairs below it are passed over. None takes all.
        rule: ``greedy`` or ``components``; or a function of one's own, which heeds neither ``keep_copies`` nor
            ``max_per_caption`` nor ``on_caption_differs``: what it drops is pooled.
        keep_copies: rows with near images that may stay beside each other: a row is dropped when as many of the rows
            kept before it show its image or a near one.
        max_per_caption: kept rows that may share a caption, equal or near ones counted; None for any number.
        on_caption_differs: ``pool`` or ``keep``.
        elsewhere: ``[n]``, rows that are dropped before all others since they stand in another set; they stand for
            nothing, and each is a group of its own.
        excluded: ``[n]``, rows that are dropped likewise since somebody listed them.
        must_stay: ``[n]``, rows that somebody listed to be kept, whatever else would drop them; judged before others.
        others: further captions of each row, as earlier curations pooled them; handed on with the row's own. None has
            none.

    Raises:
        ValueError: arrays of different lengths, an unknown rule, a number below 1.
        UserError: a rule of one's own gives something else than it should.
    """
    n = len(near.image_of)
    if not len(near.caption_of) == len(captions) == n or (prefer is not None and len(prefer) != n):
        raise ValueError("image_of, caption_of, captions and prefer must have one entry a row")
    if not callable(rule) and rule not in ("greedy", "components"):
        raise ValueError(f"unknown rule {rule!r}: choose greedy or components")
    if on_caption_differs not in ("pool", "keep"):
        raise ValueError(f"on_caption_differs is pool or keep, not {on_caption_differs!r}")
    if max_per_caption is not None and max_per_caption < 1:
        raise ValueError(f"max_per_caption must be at least 1, not {max_per_caption}")
    if keep_copies < 1:
        raise ValueError(f"keep_copies must be at least 1, not {keep_copies}")
    stays = np.zeros(n, bool) if must_stay is None else must_stay
    order = np.lexsort([np.zeros(n) if prefer is None else np.asarray(prefer), ~stays])
    for apart in (elsewhere, excluded):
        if apart is not None:
            order = order[~apart[order]]
    image_pairs = near.image_pairs if threshold is None else near.image_pairs.at_least(threshold)
    differing = on_caption_differs == "keep"
    judge = Judge(near, image_pairs, captions, order, keep_copies, max_per_caption, differing, others, stays)
    if callable(rule):
        shown = AtThreshold(near.image_of, image_pairs, near.caption_of, near.caption_pairs)
        judge.by_stand_ins(_checked(rule, rule(shown, captions, order.copy()), order, n, stays), order)
    elif rule == "greedy":
        judge.greedy()
    else:
        judge.components()
    if excluded is not None:
        judge.reason[excluded] = EXCLUDED
    if elsewhere is not None:
        judge.reason[elsewhere] = OTHER_SET
    return judge.verdicts()


def sweep(
    near: Near,
    captions: Sequence[str],
    prefer: NDArray[np.int64] | None,
    thresholds: Iterable[float],
    **options: Any,
) -> list[dict[str, Any]]:
    """What other thresholds of image similarity would do, from one join.

    Args:
        near: the joins; that of images holds all pairs down to the lowest threshold.
        captions: see :func:`decide`, like ``prefer`` and ``options``.
        prefer: rank of each row, or None.
        thresholds: of the cosine of images.
        **options: the other arguments of :func:`decide`.

    Returns:
        For each threshold ``threshold, kept, dropped, groups`` (of more than one row).
    """
    table = []
    for threshold in thresholds:
        verdicts = decide(near, captions, prefer, threshold=threshold, **options)
        kept = int(verdicts.kept.sum())
        groups = int((np.bincount(verdicts.group) > 1).sum()) if len(verdicts.group) else 0
        table.append({"threshold": threshold, "kept": kept, "dropped": len(verdicts.kept) - kept, "groups": groups})
    return table


def _checked(
    rule: OwnRule, stand_in: Any, order: NDArray[np.int64], n: int, must_stay: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """What a rule gave, if it can be followed; what must stay does, whatever it gave for that."""
    name = getattr(rule, "__name__", type(rule).__name__)
    given = np.asarray(stand_in)
    if given.shape != (n,) or given.dtype.kind not in "iu":
        shape = f"{given.dtype} {list(given.shape)}"
        raise UserError(f"rule {name}: gave {shape} where a row or -1 for each of the {n} rows belongs, int64 [{n}]")
    given = np.where(must_stay, -1, given)
    judged = np.zeros(n, bool)
    judged[order] = True
    dropped = judged & (given != -1)
    for row in np.flatnonzero(dropped).tolist():
        kept = int(given[row])
        if not 0 <= kept < n or not judged[kept] or dropped[kept]:
            raise UserError(f"rule {name}: row {row} cannot be dropped for {kept}, which is no row that is kept")
    return np.where(judged, given, -1).astype(np.int64)


class Judge:
    """The state of one decision: the verdicts so far, and who was kept of which image and caption."""

    def __init__(
        self,
        near: Near,
        image_pairs: Pairs,
        captions: Sequence[str],
        order: NDArray[np.int64],
        keep_copies: int,
        max_per_caption: int | None,
        keep_differing: bool,
        others: Sequence[Sequence[str]] | None,
        must_stay: NDArray[np.bool_],
    ):
        n = len(near.image_of)
        self.captions, self.others = captions, others
        self.keep_copies, self.max_per_caption, self.keep_differing = keep_copies, max_per_caption, keep_differing
        self.image_of, self.caption_of = near.image_of.tolist(), near.caption_of.tolist()
        self.images = Neighbours(image_pairs, 1 + max(self.image_of, default=-1))
        self.texts = Neighbours(near.caption_pairs, 1 + max(self.caption_of, default=-1))
        self.rank = np.empty(n, np.int64)
        self.rank[order] = np.arange(len(order))
        if max_per_caption is None:  # then a row whose image stands alone is kept, and decides nothing for others
            order = order[self.images.has_company(near.image_of)[order]]
        self.order = order.tolist()
        self.images.will_be_asked(near.image_of[order])
        self.texts.will_be_asked(near.caption_of[order])
        self.must_stay = must_stay
        self.reason = np.full(n, None, object)
        self.kept_by = np.full(n, -1, np.int64)
        self.image_similarity = np.full(n, np.nan, np.float32)
        self.caption_similarity = np.full(n, np.nan, np.float32)
        self.group = np.arange(n, dtype=np.int64)
        self.pooled: dict[int, dict[str, None]] = {}  # each once, in their order

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
                first = [(thing != image, -similarity, self.images.kept[thing][0]) for thing, similarity in near]
                self.group[row] = self.group[min(first, key=lambda c: (c[0], c[1], self.rank[c[2]]))[2]]
            self._keep_within_quota(row)

    def components(self) -> None:
        """All rows that near pairs link are one group; its first row stands for it."""
        root = self.images.components()
        first: dict[int, int] = {}  # by component
        kept: dict[int, list[int]] = {}
        for row in self.order:
            component = int(root[self.image_of[row]])
            stand_in = first.setdefault(component, row)
            self.group[row] = stand_in
            if stand_in != row:
                of_component = kept.get(component, [])
                if self._only_alike(row, len(of_component)):
                    alike = self.texts.kept_near(self.caption_of[row])
                    of_component = [other for other, _ in alike if root[self.image_of[other]] == component]
                copies = [(other, self._image_similarity(row, other)) for other in of_component]
                if self._drop_as_copy(row, copies):
                    continue
            if self._keep_within_quota(row):
                kept.setdefault(component, []).append(row)

    def by_stand_ins(self, stand_in: NDArray[np.int64], order: NDArray[np.int64]) -> None:
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
        if self._only_alike(row, sum(len(self.images.kept[thing]) for thing, _ in near)):
            similarity, alike = dict(near), self.texts.kept_near(self.caption_of[row])
            return [(kept, similarity[image]) for kept, _ in alike if (image := self.image_of[kept]) in similarity]
        return [(kept, similarity) for thing, similarity in near for kept in self.images.kept[thing]]

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
        handed_on = [self.captions[row]] if math.isnan(of_captions) and self._has_caption(row) else []
        if self.others is not None:
            known = (self.captions[kept], *self.others[kept])
            handed_on = [text for text in (*handed_on, *self.others[row]) if text not in known]
        if handed_on:
            self.pooled.setdefault(kept, {}).update(dict.fromkeys(handed_on))

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
        self.texts.keep(caption, row)
        return True

    def _drop(self, row: int, kept: int, reason: str, image: float, caption: float) -> None:
        self.reason[row], self.kept_by[row] = reason, kept
        self.image_similarity[row], self.caption_similarity[row] = image, caption

    def _has_caption(self, row: int) -> bool:
        return bool(self.captions[row].strip())

    def _image_similarity(self, a: int, b: int) -> float:
        return self.images.similarity(self.image_of[a], self.image_of[b])

    def _caption_similarity(self, a: int, b: int) -> float:
        return self.texts.similarity(self.caption_of[a], self.caption_of[b])

    def verdicts(self) -> Verdicts:
        """What was decided."""
        _, inverse, sizes = np.unique(self.group, return_inverse=True, return_counts=True)
        return Verdicts(
            kept=np.array([reason is None for reason in self.reason], bool),
            reason=self.reason,
            kept_by=self.kept_by,
            image_similarity=self.image_similarity,
            caption_similarity=self.caption_similarity,
            group=self.group,
            group_size=sizes[inverse].astype(np.int64) if len(sizes) else np.empty(0, np.int64),
            pooled={row: list(captions) for row, captions in self.pooled.items()},
        )

