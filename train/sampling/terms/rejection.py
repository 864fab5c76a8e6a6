"""Drawing again what comes too close to the training set: rejection with reseeding, and a guarantee.

:class:`Rejection` is the honest cheap baseline, without a paper: it knows nothing of diffusion, changes no image that
it keeps, costs as many drawings as it takes, and keeps the farthest of them. :class:`NeverAbove` draws again with other
seeds *and* stronger guidance, and withholds what no try brings below its limit. Both stand around a pipeline, not
inside its loop, so they go with any guidance:

    reject = Rejection(index, embedder)
    drawn = reject(lambda rows, seeds: pipe([prompts[i] for i in rows], generator=…), seeds)

    never = NeverAbove(index, embedder, limit=0.5)
    drawn = never(lambda rows, seeds, guidance: pipe([prompts[i] for i in rows], generator=…, guidance=guidance), seeds)
    kept = [one.image for one in drawn if not one.withheld]
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from train.sampling.config import AMGConfig, RejectionConfig, configured
from train.sampling.guidance import Guidance
from train.sampling.similarity import PixelIndex, View
from train.sampling.terms.amg import AMG
from train.sampling.terms.judges import Judges
from train.sampling.terms.random_tokens import RandomTokens

if TYPE_CHECKING:

    from curate.embed.protocol import Embedder
    from curate.index.training_index import TrainingIndex


@dataclass
class Accepted:
    """What became of one image."""

    image: Any
    """As the pipeline gave it; None if it is withheld."""
    seed: int
    """That it was drawn from in the end."""
    similarity: float
    """To the nearest training image; above the limit if no try brought it below. Of several judges, the highest."""
    tries: int
    """Drawings made, 1 or more."""
    trace: list[dict[str, Any]]
    """The pipeline's, of this image."""
    similarities: tuple[float, ...] = ()
    """By judge."""
    judge: str = ""
    """Whose similarity is the highest: its embedder's name."""
    strength: int = 0
    """How often guidance was strengthened before it was drawn."""
    withheld: bool = False


class Rejection:
    """Draws again, from other seeds, the images that come too close to a training image; keeps the farthest.

    Args:
        index: the training set, or its pixels.
        embedder: that the index was built with; none for pixels.
        config: settings.
        overrides: fields of :class:`RejectionConfig` to set otherwise.
    """

    def __init__(
        self,
        index: TrainingIndex | PixelIndex,
        embedder: Embedder | None = None,
        config: RejectionConfig | None = None,
        **overrides: Any,
    ) -> None:
        self.config = configured(RejectionConfig, config, overrides)
        self.judges = Judges((index, embedder))
        self.limit = self.judges.memorized if self.config.limit is None else self.config.limit

    def __call__(self, draw: Callable[[list[int], list[int]], Any], seeds: Sequence[int]) -> list[Accepted]:
        """Images for ``seeds``, each accepted or the farthest of its tries.

        Args:
            draw: ``(rows, seeds) → the pipeline's output`` for some of the images, in any output type.
            seeds: of each image's first try; the seeds of later ones follow from it.
        """

        def drawn(attempt: int, rows: list[int], seeds: list[int]) -> list[Accepted]:
            return judged(draw(rows, seeds), seeds, self.judges)

        return draw_again(drawn, seeds, self.config.tries, self.limit)


class NeverAbove:
    """Lets no image through whose similarity to its nearest training image is above a limit.

    Such an image is drawn again from another seed and with stronger guidance (:func:`strengthened`), again and again,
    and withheld if its last try is above the limit too. The share above it is nought by construction, by the judges'
    measure and by no other.

    Args:
        index: the training set, or its pixels.
        embedder: that the index was built with; none for pixels.
        limit: highest similarity that is let through; None is that of a copy (0.5, or −1.4 of pixels).
        tries: drawings of an image at most, the first included.
        amg: settings of the AMG that joins a guidance without one; None is the preset of the index's kind.
        judges: further ``(index, embedder)`` by whose measure no image may be above the limit either.
        withhold: what no try brought below; or else let the farthest of its drawings through.
        guided: the limit of images that guidance acted on, if it is a lower one: what was led away from a training
            image is likelier to be one still, by what no view sees, than what never came near.
        views: of the index, likewise; and what the AMG that joins follows beside it, if its settings ask for that.

    Raises:
        UserError: an index is empty, or was built with another embedder.
        UsageError: a setting makes no sense.
    """

    def __init__(
        self,
        index: TrainingIndex | PixelIndex,
        embedder: Embedder | None = None,
        *,
        limit: float | None = None,
        tries: int = 5,
        amg: AMGConfig | None = None,
        judges: Sequence[tuple[TrainingIndex | PixelIndex, Embedder | None]] = (),
        views: Sequence[View] = (),
        withhold: bool = True,
        guided: float | None = None,
    ) -> None:
        self.judges, self.withhold = Judges((index, embedder), *judges, *views), withhold
        self.config = configured(RejectionConfig, None, {"limit": limit, "tries": tries})
        self.limit = self.judges.memorized if limit is None else limit
        self.guided = self.limit if guided is None else min(guided, self.limit)
        self.amg = AMG(index, embedder, amg, views=views)

    def __call__(
        self,
        draw: Callable[[list[int], list[int], list[Guidance]], Any],
        seeds: Sequence[int],
        guidance: Sequence[Guidance] = (),
    ) -> list[Accepted]:
        """Images for ``seeds``; those withheld hold no image, and the lowest similarity that a try had.

        Args:
            draw: ``(rows, seeds, guidance) → the pipeline's output`` for some of the images under guidance terms, in
                any output type; or what :class:`Rejection` makes of it.
            seeds: of each image's first try; the seeds of later ones follow from it.
            guidance: terms of the first try.
        """

        def drawn(attempt: int, rows: list[int], seeds: list[int]) -> list[Accepted]:
            found = judged(draw(rows, seeds, strengthened(guidance, attempt, self.amg)), seeds, self.judges)
            return [replace(one, strength=attempt) for one in found]

        def limit(one: Accepted) -> float:
            return self.guided if any(step["fired"] for step in one.trace) else self.limit

        kept = draw_again(drawn, seeds, self.config.tries, limit)
        if not self.withhold:
            return kept
        return [one if one.similarity <= self.limit else replace(one, image=None, withheld=True) for one in kept]


def draw_again(
    draw: Callable[[int, list[int], list[int]], list[Accepted]],
    seeds: Sequence[int],
    tries: int,
    limit: float | Callable[[Accepted], float],
) -> list[Accepted]:
    """Draw every image, then those above ``limit`` from other seeds, until none is or ``tries`` are over.

    Args:
        draw: ``(attempt from 0, rows, seeds) → drawings`` of some of the images.
        seeds: of each image's first try.
        tries: most attempts.
        limit: highest similarity that is accepted, of all or of each drawing; one that is no number is not.

    Returns:
        Of each image the first drawing that is accepted, or else the farthest.
    """
    best: dict[int, Accepted] = {}
    rows = list(range(len(seeds)))
    for attempt in range(tries):
        now = [reseeded(seeds[row], attempt) for row in rows]
        for row, one in zip(rows, draw(attempt, rows, now), strict=True):
            before = best.get(row)
            tries_made = one.tries + (before.tries if before else 0)
            if before is None or one.similarity < before.similarity or before.similarity != before.similarity:
                best[row] = replace(one, trace=[{**step, "image": row} for step in one.trace])
            best[row].tries = tries_made
        rows = [row for row in rows if not best[row].similarity <= (limit(best[row]) if callable(limit) else limit)]
        if not rows:
            break
    return [best[row] for row in range(len(seeds))]


def judged(output: Any, seeds: Sequence[int], judges: Judges) -> list[Accepted]:
    """Each image of a pipeline's output, or of a :class:`Rejection`'s, with its similarities."""
    drawn = output if isinstance(output, list) else unjudged(output, seeds)
    images = [one.image for one in drawn]
    similarities = judges(torch.stack(images) if isinstance(images[0], torch.Tensor) else images)
    found = []
    for one, values in zip(drawn, similarities, strict=True):
        highest = max(range(len(values)), key=lambda i: (values[i] != values[i], values[i]))  # NaN is the highest
        found.append(replace(one, similarity=values[highest], similarities=values, judge=judges.names[highest]))
    return found


def unjudged(output: Any, seeds: Sequence[int]) -> list[Accepted]:
    """Each image of a pipeline's output as it was drawn, with its part of the trace."""
    return [
        Accepted(image, seed, math.nan, 1, [step for step in output.trace if step["image"] == i])
        for i, (image, seed) in enumerate(zip(output.images, seeds, strict=True))
    ]


def strengthened(guidance: Sequence[Guidance], times: int, amg: AMG) -> list[Guidance]:
    """Guidance terms, made stronger ``times`` times.

    A guidance without AMG first gets ``amg`` as its last term; AMG is then strengthened by :func:`stronger`. From the
    second time on the captions get random words too, two more each time, for a model that knows an image by its caption
    alone draws it under any guidance. Other terms stay as they are.
    """
    terms = list(guidance)
    if times > 1 and not any(isinstance(term, RandomTokens) for term in terms):
        terms = [RandomTokens(number=2 * (times - 1), optional=True), *terms]
    if times and not any(isinstance(term, AMG) for term in terms):
        terms, times = [*terms, amg], times - 1
    if not times:
        return terms
    return [
        term
        if not isinstance(term, AMG)
        else AMG(term.index, term.embedder, stronger(term.config, times), views=term.views)
        for term in terms
    ]


def stronger(config: AMGConfig, times: float) -> AMGConfig:
    """The step from AMG's preset main to strong, taken ``times`` times more.

    Each time the threshold λ and the released form's offset fall by 0.1 and c_3 doubles. ``floor`` falls by 1 each time
    too, to −1 at the lowest or to where it was: at 0 the prompt is dropped from images that are far above the
    threshold, at −1 opposed.
    """
    c = config.resolved()
    assert c.lambda_a is not None and c.lambda_b is not None and c.sim_offset is not None
    assert c.c_3 is not None and c.floor is not None
    return replace(
        c,
        lambda_a=c.lambda_a - 0.1 * times,
        lambda_b=c.lambda_b - 0.1 * times,
        sim_offset=c.sim_offset - 0.1 * times,
        c_3=c.c_3 * 2**times,
        floor=max(c.floor - times, min(c.floor, -1.0)),
    )


def reseeded(seed: int, attempt: int) -> int:
    """The seed of an image's n-th further try: the first is its own."""
    if attempt == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {attempt}".encode()).digest()[:4], "little")

