"""Localization: the few value neurons without which a model no longer draws a memorized image.

Source: Hintersdorf et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models"
(NeurIPS 2024): the memorization score (§3.1), the initial selection (§3.2, algorithm 1) and the refinement (§3.3,
algorithm 2). The criterion is the paper's; the search that meets it is another, and takes far fewer passes through the
UNet (:func:`refine`).

    found = localize(pipe, memorized_captions, clean=other_captions)
    with blocked(pipe, found.neurons):
        images = pipe(memorized_captions).images
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from curate.console import Progress, UsageError
from train.components import encode_captions, frozen, initial_noise, latent_shape
from train.memorization.magnitude import magnitude, to_eps
from train.memorization.neurons import (
    Mask,
    Statistics,
    activations,
    gates,
    to_neurons,
    union,
    value_layers,
    widths,
)
from train.memorization.ssim import ms_ssim, rescaled

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Criterion = Literal["similarity", "magnitude"]
THETA, THETA_STEP, THETA_LEAST = 5.0, 0.25, 1.0
STEPS = (0, 10, 20)
"""Of 50 DDIM steps, where the magnitude is taken; the similarity is taken at the first."""
GRADIENT_COST = 3
"""A forward and a backward pass, in forward passes."""
GRADIENT_SEEDS = 2
DOUBT = 1.5
"""A neuron is taken to be needed, untried, where its foretold rise is this many times what the score may still rise."""
BEND = 1.2
"""How much more than the sum of their foretold rises unblocking many neurons is taken to raise the score, at first."""
FEW = 4
"""Doubtful neurons that are tried one after the other, not as rows of one batch."""


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
        """What stands in the file of ``train localize`` (see :func:`~train.memorization.neurons.read_neurons`)."""
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
            over many neurons of ordinary activation.
        threshold: τ_mem; None takes the clean captions' mean score plus ``deviations`` standard deviations (§3.1).
        deviations: the paper's one.
        number: take this many neurons of every memorized prompt, the first candidates of ``magnitude``, instead of
            searching for the fewest that meet the criterion; 0 searches.
        up_blocks: search the up blocks too, which the paper leaves out.
        batch_size: images per UNet pass.
        bar: told of each prompt that is done.

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
        found.prompts.append(localizer.find(caption, chosen, threshold))
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
        if criterion not in ("similarity", "magnitude"):
            raise UsageError(f"criterion is {criterion!r}: choose similarity or magnitude")
        if number and criterion != "magnitude":
            raise UsageError("a number of neurons goes by the gradient of the magnitude: set criterion to magnitude")
        self.pipe, self.clean, self.criterion, self.batch_size = pipe, list(clean), criterion, batch_size
        self.layers = value_layers(pipe.unet, up_blocks=up_blocks)
        self.sizes = widths(self.layers)
        self.number = number
        if not 0 <= number <= sum(self.sizes.values()):
            raise UsageError(f"number is {number}: expected 0 to {sum(self.sizes.values())}, the model's neurons")
        self.statistics = Statistics.of(activations(pipe, self.clean, self.layers))

    def first_step(self, caption: str, seeds: Sequence[int]) -> FirstStep:
        """The first step of a prompt."""
        return FirstStep(self.pipe, caption, seeds, layers=self.layers, batch_size=self.batch_size)

    def calibrate(self, seeds: Sequence[int], deviations: float = 1.0, bar: Progress | None = None) -> float:
        """``τ_mem``: the clean captions' mean score plus so many standard deviations; §3.1 takes one."""
        scores = []
        for caption in self.clean:
            scores.append(float(self.first_step(caption, seeds).scores(self.criterion).max()))
            if bar is not None:
                bar.update(1)
        return float(np.mean(scores) + deviations * np.std(scores))

    def find(self, caption: str, seeds: Sequence[int], threshold: float) -> Localization:
        """The neurons of one prompt: initial selection, then refinement."""
        step = self.first_step(caption, seeds)
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
        if self.criterion == "magnitude":
            return ranked_sets(judge.slopes(np.zeros(sum(self.sizes.values()), bool)))
        values = activations(self.pipe, [caption], self.layers)[0]
        return candidate_sets(self.statistics.z(values), values, self.sizes)


class FirstStep:
    """The first denoising step of one prompt from several noises, with any neurons blocked in each row of a batch.

    Args:
        pipe: Stable Diffusion.
        caption: the prompt.
        seeds: of the initial noises.
        layers: whose neurons can be blocked.
        batch_size: images per UNet pass.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        caption: str,
        seeds: Sequence[int],
        *,
        layers: Mapping[str, nn.Module] | None = None,
        batch_size: int = 32,
    ):
        from diffusers import DDIMScheduler

        if len(set(seeds)) < 2:
            raise UsageError(f"seeds are {list(seeds)}: a score among seeds needs at least two")
        self.unet, self.layers, self.batch_size = pipe.unet, dict(layers or {}), batch_size
        self.splits = np.cumsum([0, *widths(self.layers).values()])
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(50)
        self.timesteps = [int(scheduler.timesteps[step]) for step in STEPS]
        self.alphas_cumprod = scheduler.alphas_cumprod
        self.prediction_type = scheduler.config.prediction_type
        noises = [initial_noise(latent_shape(self.unet), int(seed)) for seed in seeds]
        self.x_T = torch.stack(noises).to(self.unet.device, self.unet.dtype)
        self.empty, self.prompt = encode_captions(pipe, ["", caption]).to(self.unet.dtype)
        self.evaluations = 0
        self._unblocked: Tensor | None = None

    def eps(self, rows: Sequence[int], factors: Tensor | None, embeds: Tensor, t: int) -> Tensor:
        """``ε(x_T, e)`` of some seeds at timestep t, differentiable in the factors.

        Args:
            rows: seeds, by position.
            factors: ``[rows, units]``, 0 for the neurons that are blocked in a row; None blocks none.
            embeds: ``[tokens, width]``.
        """
        self.evaluations += len(rows)
        x = self.x_T[list(rows)]
        with gates(self.layers) as gate:
            if factors is not None:
                for number, name in enumerate(self.layers):
                    gate[name] = factors[:, None, self.splits[number] : self.splits[number + 1]]
            embeds = embeds.expand(len(rows), -1, -1)
            output = self.unet(x, t, encoder_hidden_states=embeds, return_dict=False)[0]
        return to_eps(output.float(), x.float(), self.alphas_cumprod[t], self.prediction_type)

    def difference(self, rows: Sequence[int], factors: Tensor | None = None) -> Tensor:
        """``δ = ε(x_T, e_p) − x_T``, each channel brought to [0, 1]."""
        eps = self.eps(rows, factors, self.prompt, self.timesteps[0])
        return rescaled(eps - self.x_T[list(rows)].float())

    @property
    def unblocked(self) -> Tensor:
        """The differences of all seeds with no neuron blocked."""
        if self._unblocked is None:
            with torch.no_grad():
                self._unblocked = self._batched(lambda rows: self.difference(rows), range(len(self.x_T)))
        return self._unblocked

    def similarity(self, rows: Sequence[int], factors: Tensor | None) -> Tensor:
        """MS-SSIM of the differences with neurons blocked to those without: ``[rows]``."""
        return ms_ssim(self.difference(rows, factors), self.unblocked[list(rows)])

    def magnitude(self, rows: Sequence[int], factors: Tensor | None) -> Tensor:
        """The text-conditional noise magnitude with neurons blocked in both halves, on the same pure noise at each of
        the timesteps, averaged: ``[rows]``.
        """
        parts = [[self.eps(rows, factors, embeds, t) for embeds in (self.prompt, self.empty)] for t in self.timesteps]
        return torch.stack([magnitude(cond, uncond) for cond, uncond in parts]).mean(dim=0)

    def scores(self, criterion: Criterion) -> NDArray[np.float32]:
        """How memorized each seed is, with no neuron blocked: ``[seeds]``.

        By similarity it is the highest MS-SSIM of its difference to another seed's (§3.1), by magnitude its magnitude.
        """
        rows = list(range(len(self.x_T)))
        if criterion == "magnitude":
            with torch.no_grad():
                return self._batched(lambda part: self.magnitude(part, None), rows).cpu().numpy()
        first, second = np.triu_indices(len(rows), 1)
        among = np.zeros((len(rows), len(rows)), np.float32)
        among[first, second] = ms_ssim(self.unblocked[first], self.unblocked[second]).cpu().numpy()
        return np.maximum(among, among.T).max(axis=1)

    def _batched(self, function: Callable[[Sequence[int]], Tensor], rows: Sequence[int]) -> Tensor:
        size = self.batch_size
        return torch.cat([function(rows[start : start + size]) for start in range(0, len(rows), size)])


class Blocking:
    """The criterion: with these neurons blocked, is the score of every memorized seed below the threshold?

    The score of a set is the highest among the seeds, so one seed that is not below settles it. Seeds are asked one
    before the others, the one that spoke last first: of a set that fails, mostly one pass is all that it takes.

    Args:
        step: the prompt's first step.
        rows: its memorized seeds, by position.
        threshold: ``τ_mem``.
        criterion: what the score is: the similarity to the unblocked step, or the magnitude.
    """

    def __init__(self, step: FirstStep, rows: Sequence[int], threshold: float, criterion: Criterion = "similarity"):
        self.step, self.rows, self.threshold = step, list(rows), threshold
        self.measure = step.magnitude if criterion == "magnitude" else step.similarity

    @torch.no_grad()
    def measures(self, rows: Sequence[int], masks: Mask) -> NDArray[np.float32]:
        """Of each row, with ``masks [rows, units]`` blocked: ``[rows]``."""
        parts, size = [], self.step.batch_size
        factors = torch.from_numpy(~masks).to(self.step.unet.device, self.step.unet.dtype)
        for start in range(0, len(rows), size):
            parts.append(self.measure(rows[start : start + size], factors[start : start + size]))
        return torch.cat(parts).cpu().numpy()

    def score(self, mask: Mask) -> float:
        """Of a set: the highest of all memorized seeds."""
        return float(self.measures(self.rows, np.tile(mask, (len(self.rows), 1))).max())

    def objection(self, mask: Mask) -> tuple[int, float] | None:
        """A seed whose measure is not below the threshold, and the measure; None if all are below.

        The seed that objected last is asked first, and the others only if it does not.
        """
        for rows in (self.rows[:1], self.rows[1:]):
            if not rows:
                continue
            measures = self.measures(rows, np.tile(mask, (len(rows), 1)))
            worst = int(measures.argmax())
            if measures[worst] >= self.threshold:
                self.rows.remove(rows[worst])
                self.rows.insert(0, rows[worst])
                return rows[worst], float(measures[worst])
        return None

    def passes(self, mask: Mask) -> bool:
        """Whether the score is below the threshold."""
        return self.objection(mask) is None

    def singles(self, mask: Mask, units: NDArray[np.int64]) -> NDArray[np.float32]:
        """What unblocking each unit alone gives on the strictest seed: ``[units]``."""
        masks = np.tile(mask, (len(units), 1))
        masks[np.arange(len(units)), units] = False
        return self.measures(self.rows[:1] * len(units), masks)

    def slope(self, row: int, mask: Mask) -> tuple[float, NDArray[np.float32]]:
        """A seed's measure, and how fast it grows as each unit is unblocked, to first order: ``[units]``."""
        step, before = self.step, self.step.evaluations
        with torch.enable_grad(), frozen(step.unet):
            factors = torch.from_numpy(~mask).to(step.unet.device, step.unet.dtype)[None].requires_grad_()
            measure = self.measure([row], factors).sum()
            slopes = torch.autograd.grad(measure, factors)[0][0]
        step.evaluations += (GRADIENT_COST - 1) * (step.evaluations - before)
        return float(measure.detach()), slopes.float().cpu().numpy()

    def slopes(self, mask: Mask) -> NDArray[np.float32]:
        """The sum of the strictest seeds' slopes: ``[units]``."""
        return np.sum([self.slope(row, mask)[1] for row in self.rows[:GRADIENT_SEEDS]], axis=0)


def candidate_sets(z: NDArray[np.float32], values: NDArray[np.float32], sizes: Mapping[str, int]) -> list[Mask]:
    """The initial selection's growing sets (algorithm 1): ``z > θ`` with θ from 5 down by 0.25 to 1, and in every layer
    the k highest activations with k from 0 up by 1, until they hold every neuron; empty ones are left out.

    Args:
        z: ``[units]``, see :meth:`~train.memorization.neurons.Statistics.z`.
        values: ``[units]``, the prompt's activations.
        sizes: of the layers.
    """
    # rank of each unit in its layer by activation, from 0 for the highest
    parts = np.split(values, np.cumsum(list(sizes.values()))[:-1])
    rank = np.concatenate([np.argsort(np.argsort(-part, kind="stable")) for part in parts])
    steps = [(max(THETA - THETA_STEP * k, THETA_LEAST), k) for k in range(max(sizes.values()) + 1)]
    sets = [(z > theta) | (rank < k) for theta, k in steps]
    return [mask for mask in sets if mask.any()]


def ranked_sets(slopes: NDArray[np.float32]) -> list[Mask]:
    """Growing sets of the units by which the magnitude grows fastest: the first, the first two, …"""
    rank = np.argsort(np.argsort(-slopes, kind="stable"))
    return [rank < n for n in range(1, len(slopes) + 1)]


def select(judge: Blocking, sets: Sequence[Mask]) -> Mask | None:
    """The first of growing sets that passes; None where not even the last does.

    The paper tries one after the other. Each set holds the ones before it, so this goes by doubling steps and then by
    halves; the set found passes and the one before it does not.
    """
    low, high = -1, 0
    while not judge.passes(sets[high]):
        if high == len(sets) - 1:
            return None
        low, high = high, min(2 * high + 1, len(sets) - 1)
    while high - low > 1:
        middle = (low + high) // 2
        if judge.passes(sets[middle]):
            high = middle
        else:
            low = middle
    return sets[high]


def refine(judge: Blocking, mask: Mask) -> Mask:
    """Unblock every neuron whose absence is not needed (algorithm 2): the set passes, and no kept one could be spared.

    The paper asks for each layer and then for each neuron, with all seeds, whether the score stays below the threshold
    without it. Here the gradient of a seed's score foretells what each neuron adds as it is unblocked, and as many as
    fit below the threshold are unblocked at once, round by round. It ends where every kept neuron was tried alone
    against the set as it is, or is foretold to lift the score by more than :data:`DOUBT` times what is left. That is
    the one shortcut that proves nothing: ``benchmarks/localize.py`` tries all of them.

    Args:
        judge: the criterion.
        mask: ``[units]``, a set that passes.

    Returns:
        ``[units]``, a part of it.
    """
    mask, needed, stale = mask.copy(), np.zeros(len(mask), bool), False
    while True:
        spared = _sparable(judge, mask, needed)
        mask[spared] = False
        if len(spared):
            stale = bool(needed.any())
        elif stale:  # those that were needed before others were spared are asked again
            needed, stale = np.zeros(len(mask), bool), False
        else:
            return mask


@dataclass
class _Forecast:
    """What unblocking neurons does to one seed's measure, as a gradient foretells it."""

    room: float
    """What is left to the threshold."""
    rises: NDArray[np.float32]
    """``[units]``, of each alone."""
    bend: float = BEND
    """How many times the sum of their rises many together are taken to add."""

    def fitting(self, units: NDArray[np.int64]) -> int:
        """How many, from the first, stay below the threshold together."""
        return int((self.bend * np.cumsum(self.rises[units]) < self.room).sum())

    def learn(self, units: NDArray[np.int64], rise: float) -> None:
        """What unblocking these together did."""
        foretold = float(self.rises[units].sum())
        if foretold > 0:
            self.bend = max(self.bend, 1.1 * rise / foretold)


def _sparable(judge: Blocking, mask: Mask, needed: Mask) -> NDArray[np.int64]:
    """Units of the set, but for the ``needed``, that can be unblocked together, about as many as can; or none.

    Those that are tried alone and cannot be spared become ``needed``.
    """
    forecasts: dict[int, _Forecast] = {}
    asked, most = set(), len(mask)
    while True:
        strictest = judge.rows[0]
        if strictest not in forecasts:
            measure, rises = judge.slope(strictest, mask)
            # the set passes, but for rounding
            forecasts[strictest] = _Forecast(max(judge.threshold - measure, 1e-9), rises)
        shares = np.max([seed.rises / seed.room for seed in forecasts.values()], axis=0)
        pending = np.flatnonzero(mask & ~needed & (shares < DOUBT))
        pending = pending[np.argsort(shares[pending], kind="stable")]
        if not len(pending):
            return pending
        fitting = min(most, *(seed.fitting(pending) for seed in forecasts.values()))
        if not fitting and strictest not in asked and len(pending) > FEW:
            asked.add(strictest)
            measures, seed = judge.singles(mask, pending), forecasts[strictest]
            needed[pending[measures >= judge.threshold]] = True
            seed.rises[pending] = measures - (judge.threshold - seed.room)
            continue
        chosen = pending[: max(fitting, 1)]
        without = mask.copy()
        without[chosen] = False
        if (objection := judge.objection(without)) is None:
            return chosen
        row, measure = objection
        if len(chosen) == 1:
            needed[chosen], most = True, len(mask)
        elif row in forecasts:
            seed = forecasts[row]
            seed.learn(chosen, measure - (judge.threshold - seed.room))
            most = len(chosen) * 3 // 4  # in case the forecast says too little
        else:
            most = len(chosen) - 1
