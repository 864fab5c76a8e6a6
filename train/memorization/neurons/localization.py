"""Localization: the few value neurons without which a model no longer draws a memorized image.

Source: Hintersdorf et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models"
(NeurIPS 2024): the memorization score (§3.1), the initial selection (§3.2, algorithm 1) and the refinement (§3.3,
algorithm 2). The criterion is the paper's; the search that meets it is another, and takes far fewer passes through the
UNet (:func:`~train.memorization.neurons.search.refine`).

    found = localize(pipe, memorized_captions, clean=other_captions)
    with blocked(pipe, found.neurons):
        images = pipe(memorized_captions).images
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from afresh.errors import UsageError
from afresh.progress import Progress
from train.denoising.network import network_of
from train.memorization.neurons.first_step import Criterion, FirstStep
from train.memorization.neurons.search import Blocking, candidate_sets, ranked_sets, refine, select
from train.memorization.neurons.selectivity import per_cost, sensitivity
from train.memorization.neurons.value_neurons import (
    Mask,
    Statistics,
    activations,
    to_neurons,
    union,
    value_layers,
    widths,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class Localization:
    """What was found for one prompt."""

    caption: str
    seeds: list[int]
    memorized_seeds: list[int]
    """Those whose own score is above the threshold; only they are judged."""
    score: float
    """Highest of the seeds: MS-SSIM to another seed's first-step difference, or the magnitude."""
    threshold: float
    initial: int
    """Neurons of the initial selection."""
    neurons: dict[str, list[int]]
    """Layer → units, after the refinement; empty where the prompt is not memorized, or no set meets the criterion."""
    blocked_score: float
    """Highest of the memorized seeds with these neurons blocked: MS-SSIM to the unblocked difference, or the
    magnitude."""
    found: bool
    """Whether the score is below the threshold. If it is not, blocking every neuron leaves ``blocked_score``, or the
    number that was asked for does."""
    evaluations: int
    """UNet passes spent, counted in single images; a gradient counts as three."""


@dataclass(frozen=True)
class Localized:
    """What :func:`localize` found."""

    threshold: float
    prompts: list[Localization] = field(default_factory=list)

    @property
    def neurons(self) -> dict[str, list[int]]:
        """The neurons of all prompts together."""
        return union(prompt.neurons for prompt in self.prompts)

    def to_json(self) -> dict[str, Any]:
        """What stands in the file of ``train localize``, which ``neurons/files.py`` reads."""
        return {
            "threshold": self.threshold,
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "neurons": self.neurons,
            "unfinished": False,
        }


def localize(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    clean: Sequence[str],
    seeds: int | Sequence[int] = 10,
    criterion: Criterion = "similarity",
    threshold: float | None = None,
    deviations: float = 1.0,
    number: int = 0,
    up_blocks: bool = False,
    batch_size: int = 32,
    bar: Progress | None = None,
) -> Localized:
    """Find the neurons of each memorized prompt.

    Args:
        pipe: any Stable Diffusion pipeline; no part of it is changed.
        prompts: captions known or suspected to be memorized.
        clean: captions that are not memorized; the statistics of activations rest on them, and the threshold too if
            none is given. Tens at least; the text encoder alone sees them for the former.
        seeds: initial noises: how many (0, 1, …), or which ones.
        criterion: what has to fall below the threshold. ``similarity`` is the paper's: MS-SSIM of the first step's
            difference with neurons blocked to that without, and candidates by their activations. ``magnitude`` is the
            text-conditional noise magnitude on pure noise, averaged over three timesteps, and candidates by its
            gradient with respect to each neuron's factor: not the paper's, and for models whose memorization is spread
            over many neurons of ordinary activation. ``selective`` is the same with candidates by that gradient over
            what blocking them costs clean captions (:mod:`train.memorization.neurons.selectivity`).
        threshold: τ_mem; None takes the clean captions' mean score plus ``deviations`` standard deviations (§3.1).
        deviations: the paper's one.
        number: take this many neurons of every memorized prompt, the first candidates of ``magnitude`` or
            ``selective``, instead of searching for the fewest that meet the criterion; 0 searches.
        up_blocks: search the up blocks too, which the paper leaves out.
        batch_size: images per UNet pass.
        bar: told of each prompt that is done, and of the evaluations on the way.

    Raises:
        UsageError: no prompt, or fewer than two seeds or clean captions.
        UserError: the model has no cross-attention.
    """
    if not prompts:
        raise UsageError("nothing to localize: there must be at least one prompt")
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    localizer = Localizer(pipe, clean, criterion=criterion, number=number, up_blocks=up_blocks, batch_size=batch_size)
    if threshold is None:
        threshold = localizer.calibrate(chosen, deviations)
    found = Localized(threshold)
    for caption in prompts:
        found.prompts.append(localizer.find(caption, chosen, threshold, bar))
        if bar is not None:
            bar.update(1)
    return found


class Localizer:
    """A model with the statistics of its neurons, for one prompt after the other.

    Args:
        pipe: Stable Diffusion.
        clean: captions that are not memorized, two at least.
        criterion: see :func:`localize`.
        number: see :func:`localize`.
        up_blocks: include the up blocks.
        batch_size: images per UNet pass.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        clean: Sequence[str],
        *,
        criterion: Criterion = "similarity",
        number: int = 0,
        up_blocks: bool = False,
        batch_size: int = 32,
    ):
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}: expected at least 1")
        if criterion not in get_args(Criterion):
            raise UsageError(f"criterion is {criterion!r}: choose {', '.join(get_args(Criterion))}")
        if number and criterion == "similarity":
            raise UsageError("a number of neurons goes by the gradient of the magnitude: set criterion to magnitude")
        self.pipe, self.clean, self.criterion, self.batch_size = pipe, list(clean), criterion, batch_size
        self.layers = value_layers(network_of(pipe), up_blocks=up_blocks)
        self.sizes = widths(self.layers)
        self.number = number
        if not 0 <= number <= sum(self.sizes.values()):
            raise UsageError(f"number is {number}: expected 0 to {sum(self.sizes.values())}, the model's neurons")
        self.statistics = Statistics.of(activations(pipe, self.clean, self.layers))

    @cached_property
    def sensitivity(self) -> NDArray[np.float32]:
        """What blocking each neuron costs the clean captions, ``[units]``."""
        return sensitivity(self.pipe, self.clean, self.layers, batch_size=self.batch_size)

    def first_step(self, caption: str, seeds: Sequence[int], bar: Progress | None = None) -> FirstStep:
        """The first step of a prompt."""
        return FirstStep(self.pipe, caption, seeds, layers=self.layers, batch_size=self.batch_size, bar=bar)

    def calibrate(self, seeds: Sequence[int], deviations: float = 1.0, bar: Progress | None = None) -> float:
        """``τ_mem``: the clean captions' mean score plus so many standard deviations; §3.1 takes one."""
        scores = []
        for caption in self.clean:
            scores.append(float(self.first_step(caption, seeds, bar).scores(self.criterion).max()))
            if bar is not None:
                bar.update(1)
        return float(np.mean(scores) + deviations * np.std(scores))

    def find(
        self, caption: str, seeds: Sequence[int], threshold: float, bar: Progress | None = None
    ) -> Localization:
        """The neurons of one prompt: initial selection, then refinement; ``bar`` is told of the evaluations."""
        step = self.first_step(caption, seeds, bar)
        scores = step.scores(self.criterion)
        memorized = np.flatnonzero(scores > threshold)
        units = sum(self.sizes.values())
        mask: Mask | None = np.zeros(units, bool)
        initial, blocked_score = 0, float(scores.max())
        if len(memorized):
            judge = Blocking(step, memorized.tolist(), threshold, self.criterion)
            candidates = self._candidates(judge, caption)
            mask = candidates[self.number - 1] if self.number else select(judge, candidates)
            if mask is not None:
                initial = int(mask.sum())
                mask = mask if self.number else refine(judge, mask)
            blocked_score = judge.score(np.ones(units, bool) if mask is None else mask)
        return Localization(
            caption=caption,
            seeds=list(seeds),
            memorized_seeds=[seeds[row] for row in memorized.tolist()],
            score=float(scores.max()),
            threshold=threshold,
            initial=initial,
            neurons={} if mask is None else to_neurons(mask, self.sizes),
            blocked_score=blocked_score,
            found=blocked_score < threshold,
            evaluations=step.evaluations,
        )

    def _candidates(self, judge: Blocking, caption: str) -> list[Mask]:
        if self.criterion != "similarity":
            slopes = judge.slopes(np.zeros(sum(self.sizes.values()), bool))
            return ranked_sets(slopes if self.criterion == "magnitude" else per_cost(slopes, self.sensitivity))
        values = activations(self.pipe, [caption], self.layers)[0]
        return candidate_sets(self.statistics.z(values), values, self.sizes)

