"""From near pairs to verdicts: who is kept, and who stands for whom. Pure: arrays in, arrays out.

Rows are the readable samples in input order. Rows with equal pixels share an *image*, rows with equal
normalised captions share a *caption*; near pairs are between distinct images and between distinct captions,
so that a thousand copies of one placeholder cost nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from afresh.errors import UserError
from curate.decisions.judge import Judge
from curate.decisions.parts import AtThreshold, Near, Part, parts_of
from curate.decisions.pooling import Pooled
from curate.decisions.rounds import settle
from curate.decisions.settled import CODE, EXCLUDED, OF_ITS_IMAGE, OTHER_SET, REASONS, Settled

if TYPE_CHECKING:
    from afresh.progress import Progress


Rule = Literal["greedy", "components"]
OnCaptionDiffers = Literal["pool", "keep"]


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
    """One verdict a row; numbers of rows take four bytes each where that is enough.

    Attributes:
        code: uint8 ``[n]``, which of ``reasons`` a row is dropped for; 0 for a kept one.
        reasons: by their code; the first is None.
        kept_by: ``[n]``, the kept row that stands for a dropped one; -1 for a kept one, and for one that stands
            in another set or was excluded.
        image_similarity: float32 ``[n]``, cosine of a row with its stand-in, 1 for equal pixels; NaN where it
            is not known, because there is no stand-in or the two are no near pair.
        caption_similarity: float32 ``[n]``, likewise of the captions.
        group: ``[n]``: rows that show one image have one group, named by its first member in the order
            of preference. A row dropped for its caption alone is its own image.
        group_size: ``[n]``, rows in the row's group.
        pooled: the captions that a kept row inherits from dropped copies of its image, by kept row: those that differ
            from its own, and what the copies had beside theirs; distinct, in the order of preference. They are put
            together when they are asked for (:class:`curate.decisions.pooling.Pooled`).
    """

    code: NDArray[np.unsignedinteger]
    reasons: tuple[str | None, ...]
    kept_by: NDArray[np.integer]
    image_similarity: NDArray[np.float32]
    caption_similarity: NDArray[np.float32]
    group: NDArray[np.integer]
    group_size: NDArray[np.integer]
    pooled: Mapping[int, list[str]]

    @property
    def kept(self) -> NDArray[np.bool_]:
        """``[n]``."""
        return self.code == 0

    @property
    def reason(self) -> NDArray[np.object_]:
        """``[n]``, why a row is dropped; None for a kept one."""
        return self.reason_of(slice(None))

    def reason_of(self, rows: slice) -> NDArray[np.object_]:
        """Likewise of some rows."""
        return np.array(self.reasons, object)[self.code[rows]]

    def dropped_for(self, *reasons: str) -> NDArray[np.bool_]:
        """``[n]``, which rows are dropped for one of these reasons."""
        return np.isin(self.code, [code for code, reason in enumerate(self.reasons) if reason in reasons])

    @classmethod
    def of(
        cls,
        settled: Settled,
        rank: NDArray[np.integer],
        captions: Sequence[str],
        others: Sequence[Sequence[str]] | None,
    ) -> Verdicts:
        """What was decided, in words."""
        sizes = np.bincount(settled.group, minlength=1).astype(settled.group.dtype)
        of_its_image = np.isin(settled.reason, [CODE[reason] for reason in OF_ITS_IMAGE])
        differs = np.isnan(settled.caption_similarity)
        return cls(
            code=settled.reason,
            reasons=(None, *REASONS),
            kept_by=settled.kept_by,
            image_similarity=settled.image_similarity,
            caption_similarity=settled.caption_similarity,
            group=settled.group,
            group_size=sizes[settled.group],
            pooled=Pooled.of(of_its_image, settled.kept_by, rank, differs, captions, others),
        )


def decide(
    near: Near,
    captions: Sequence[str],
    prefer: NDArray[np.integer] | None = None,
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
    bar: Progress | None = None,
) -> Verdicts:
    """Keep or drop each row.

    Rows are judged in the order of preference. Under ``greedy`` a row is dropped if a row *already kept*
    shows its image or a near one, so its stand-in is a near-duplicate indeed, and a chain of near pairs
    swallows nothing. Under ``components`` all that is linked by near pairs is one group, and its first row
    stands for it, near or not. A copy under another caption (one that is neither equal nor near) is dropped
    and its caption pooled, or judged a sample of its own (``keep``). What shows an image of its own is then
    held against the caption quota.

    Rows are decided about in parts (:mod:`curate.decisions.parts`): the pairs of one are in memory at a time, and time
    grows with the rows and their pairs (but see :class:`curate.decisions.judge.Judge`).

    Args:
        near: the joins; their pairs may be memory maps.
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
        bar: told of the rows that are done; rows that are near none are not.

    Raises:
        ValueError: arrays of different lengths, an unknown rule, a number below 1.
        UserError: a rule of one's own gives something else than it should.
    """
    how = _How.of(
        near, captions, prefer, rule, keep_copies, max_per_caption, on_caption_differs, elsewhere, excluded, must_stay
    )
    settled = Settled.kept(len(captions))
    if callable(rule):
        settled = how.by_own_rule(rule, near, captions, threshold)
    else:
        for part in how.parts(near):
            settled.put(part.rows, how.settle(part, threshold))
            if bar is not None:
                bar.update(len(part.rows))
    if excluded is not None:
        settled.reason[excluded] = CODE[EXCLUDED]
    if elsewhere is not None:
        settled.reason[elsewhere] = CODE[OTHER_SET]
    return Verdicts.of(settled, how.rank, captions, others)


def sweep(
    near: Near,
    captions: Sequence[str],
    prefer: NDArray[np.integer] | None,
    thresholds: Sequence[float],
    *,
    bar: Progress | None = None,
    others: object = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """What other thresholds of image similarity would do, from one join and one way through its pairs.

    Args:
        near: the joins; that of images holds all pairs down to the lowest threshold.
        captions: see :func:`decide`, like ``prefer`` and ``options``.
        prefer: rank of each row, or None.
        thresholds: of the cosine of images.
        bar: told of the rows that are done, each as often as there are thresholds; rows that are near none are not.
        others: has no part in it.
        **options: the other arguments of :func:`decide`.

    Returns:
        For each threshold ``threshold, kept, dropped, groups`` (of more than one row).
    """
    n = len(captions)
    how = _How.of(near, captions, prefer, **options)
    kept, groups = (np.full(len(thresholds), number, np.int64) for number in (int((how.rank >= 0).sum()), 0))

    def tried() -> Iterator[tuple[int, Settled]]:
        if callable(how.rule):
            yield from enumerate(how.by_own_rule(how.rule, near, captions, threshold) for threshold in thresholds)
        else:
            for part in how.parts(near):
                for number, threshold in enumerate(thresholds):
                    yield number, how.settle(part, threshold)

    for number, settled in tried():
        kept[number] -= np.count_nonzero(settled.reason)
        groups[number] += np.count_nonzero(np.bincount(settled.group) > 1)
        if bar is not None:
            bar.update(len(settled.reason))
    return [
        {"threshold": threshold, "kept": some, "dropped": n - some, "groups": of_some}
        for threshold, some, of_some in zip(thresholds, kept.tolist(), groups.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class _How:
    """What a decision goes by, beside the threshold: the arguments of :func:`decide`, checked.

    Attributes:
        rank: ``[n]``, place in the order in which rows are judged; -1 for those that are not.
        captioned: ``[n]``, whether a row has a caption; empty where nobody asks.
        stays: ``[n]``, whether it must stay.
    """

    rule: Rule | OwnRule
    keep_copies: int
    max_per_caption: int | None
    keep_differing: bool
    rank: NDArray[np.integer]
    captioned: NDArray[np.bool_]
    stays: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        near: Near,
        captions: Sequence[str],
        prefer: NDArray[np.integer] | None,
        rule: Rule | OwnRule = "greedy",
        keep_copies: int = 1,
        max_per_caption: int | None = None,
        on_caption_differs: OnCaptionDiffers = "pool",
        elsewhere: NDArray[np.bool_] | None = None,
        excluded: NDArray[np.bool_] | None = None,
        must_stay: NDArray[np.bool_] | None = None,
    ) -> _How:
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
        order = _in_order(n, prefer, stays)
        for apart in [one for one in (elsewhere, excluded) if one is not None]:
            order = order[~apart[order]]
        rank = np.full(n, -1, order.dtype)
        rank[order] = np.arange(len(order), dtype=order.dtype)
        keep_differing = on_caption_differs == "keep"
        asked = n if keep_differing or max_per_caption is not None else 0
        captioned = np.fromiter((bool(text.strip()) for text in itertools.islice(captions, asked)), bool, asked)
        return cls(rule, keep_copies, max_per_caption, keep_differing, rank, captioned, stays)

    def parts(self, near: Near) -> Iterator[Part]:
        """The rows that are to be decided about, by what they are linked with."""
        return parts_of(near, by_captions=self.max_per_caption is not None, apart=self.stays)

    def settle(self, part: Part, threshold: float | None) -> Settled:
        """Decide about a part, by one of our rules."""
        near, rank = part.near, self.rank[part.rows]
        if threshold is not None:
            near = replace(near, image_pairs=near.image_pairs.at_least(threshold))
        alone = self.keep_copies == 1 and self.max_per_caption is None and not self.keep_differing
        if self.rule == "greedy" and alone and not part.by_hand:
            return settle(near, rank, rank >= 0)
        captioned = self.captioned[part.rows] if len(self.captioned) else self.captioned
        judge = self._judge(near, captioned, _places(rank), self.stays[part.rows])
        judge.greedy() if self.rule == "greedy" else judge.components()
        return judge.settled()

    def by_own_rule(self, rule: OwnRule, near: Near, captions: Sequence[str], threshold: float | None) -> Settled:
        """Decide about all rows at once, by a rule that is not ours."""
        pairs = near.image_pairs if threshold is None else near.image_pairs.at_least(threshold)
        shown = AtThreshold(near.image_of, pairs, near.caption_of, near.caption_pairs)
        order = _places(self.rank)
        stand_in = _checked(rule, rule(shown, captions, order.astype(np.int64)), order, len(captions), self.stays)
        judge = self._judge(shown, self.captioned, order, self.stays)
        judge.by_stand_ins(stand_in, order)
        return judge.settled()

    def _judge(
        self, near: AtThreshold, captioned: NDArray[np.bool_], order: NDArray[np.integer], stays: NDArray[np.bool_]
    ) -> Judge:
        return Judge(near, captioned, order, self.keep_copies, self.max_per_caption, self.keep_differing, stays)


def _places(rank: NDArray[np.integer]) -> NDArray[np.integer]:
    """The rows that have a rank, by rank."""
    order = np.argsort(rank, kind="stable")
    return order[np.count_nonzero(rank < 0) :].astype(rank.dtype)


def _checked(
    rule: OwnRule, stand_in: Any, order: NDArray[np.integer], n: int, must_stay: NDArray[np.bool_]
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


def _in_order(n: int, prefer: NDArray[np.integer] | None, stays: NDArray[np.bool_]) -> NDArray[np.integer]:
    """The rows as they are judged, in four bytes each where that is enough."""
    order = np.lexsort([np.zeros(n, np.int8) if prefer is None else np.asarray(prefer), ~stays])
    return order.astype(np.int32 if n < 1 << 31 else np.int64)
