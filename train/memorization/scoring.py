"""The scoring loop: what signals of memorization say of prompts, from as few evaluations of the denoiser as they need.

    pipe = load_pipeline("train/assets/sample_model")
    scores = score(pipe, ["grinning face, face smiling"], steps=5, signals=["magnitude", "anisotropy"])
    scores.per_prompt("anisotropy")        # [prompts]

The initial noise is the same for all prompts of a seed, and without a prompt so is the prediction: where prompts share
their seeds, ``ε(x_T, e_∅)`` is computed once a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afresh.errors import UsageError, UserError
from afresh.progress import Progress
from train.denoising.conditioning import Conditioning
from train.denoising.families.registry import denoiser_of
from train.denoising.families.stable_diffusion import end_positions
from train.denoising.predictions import Prediction
from train.memorization.checks import check_scored_steps
from train.memorization.cross_attention import as_map, end_share, finest_down_layers, recorded_attention
from train.memorization.signals.magnitude import Form
from train.memorization.signals.protocol import Seen, Signal
from train.memorization.signals.registry import find_signals

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class PromptScore:
    """What was found of one prompt. Plain numbers: as JSON and back, it is the same."""

    row: int
    """Of the prompts."""
    seeds: list[int]
    values: dict[str, list[float]]
    """Signal → its value for each seed."""
    of_prompt: dict[str, float]
    """Signal → its value for the prompt."""
    observed: dict[str, list[list[float]]]
    """Signal → ``[seeds, observations]`` that its values come from, of those that keep one number of an evaluation."""
    evaluations: int
    """Of the denoiser, counted in single images; without those shared with other prompts."""


@dataclass(frozen=True)
class Scores:
    """What :func:`score` found."""

    seeds: NDArray[np.int64]
    """``[prompts, seeds]``: the seed of every initial noise."""
    timesteps: NDArray[np.int64]
    """``[steps]``: the steps of the trajectory that were looked at; none if every signal looks at noise alone."""
    values: Mapping[str, NDArray[np.float32]]
    """Signal → ``[prompts, seeds]``."""
    of_prompt: Mapping[str, NDArray[np.float32]]
    """Signal → ``[prompts]``."""
    observed: Mapping[str, NDArray[np.float32]]
    """Signal → ``[prompts, seeds, observations]``: its trajectory, ``[…, steps]``, where it looks at every step.
    Signals that compare images have none."""
    evaluations: int
    """Denoiser evaluations spent, counted in single images."""

    @classmethod
    def of(cls, prompts: Sequence[PromptScore], timesteps: Sequence[int], shared: int) -> Scores:
        """From the scores of at least one prompt, in order, and the evaluations that they shared."""
        first = prompts[0]
        return cls(
            seeds=np.array([one.seeds for one in prompts], np.int64),
            timesteps=np.array(timesteps, np.int64),
            values={name: np.array([one.values[name] for one in prompts], np.float32) for name in first.values},
            of_prompt={name: np.array([one.of_prompt[name] for one in prompts], np.float32) for name in first.values},
            observed={name: np.array([one.observed[name] for one in prompts], np.float32) for name in first.observed},
            evaluations=shared + sum(one.evaluations for one in prompts),
        )

    @property
    def magnitudes(self) -> NDArray[np.float32]:
        """``[prompts, seeds, steps]``: the magnitude along the trajectory."""
        return self._of("magnitude", self.observed)

    def signal(self, name: str = "magnitude") -> NDArray[np.float32]:
        """``[prompts, seeds]``; what looks at every step is averaged over the steps."""
        return self._of(name, self.values)

    def per_prompt(self, name: str = "magnitude") -> NDArray[np.float32]:
        """``[prompts]``; higher = more likely memorized. The mean over the seeds; of consistency, the highest."""
        return self._of(name, self.of_prompt)

    def _of(self, name: str, table: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        if name not in table:
            raise UsageError(f"signal {name!r} was not computed: these were: {', '.join(self.values)}")
        return table[name]


def score(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int = 1,
    num_inference_steps: int = 50,
    seeds: int | Sequence[int] | NDArray[np.int64] = 4,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
    signals: Sequence[str | Signal] = ("magnitude",),
    form: Form = "l2",
    batch_size: int = 32,
    bar: Progress | None = None,
) -> Scores:
    """Follow the guided DDIM trajectory of every prompt and seed for its first ``steps`` steps.

    Each step evaluates the denoiser on the batch's unconditional and conditional halves together, or on the conditional
    half alone where nothing needs the other; the last step needs no update of the latents. A seed gives the same
    initial noise whatever the prompt, batch or device.

    Args:
        pipe: any Stable Diffusion pipeline; its scheduler's noise schedule and prediction type are taken
            over, and neither it nor any other part is changed.
        prompts: captions.
        steps: steps to score, from the first (t near T). Signals that look at the first step alone need no others.
        num_inference_steps: steps of the whole trajectory.
        seeds: how many (0, 1, …), or which ones; ``[prompts, seeds]`` gives each prompt its own.
        guidance_scale: classifier-free guidance scale that the trajectory follows.
        negative_prompt: what stands for ``e_∅``.
        signals: what is to be computed: names of ``train.memorization.signals.registry.SIGNALS``, or objects of one's
            own.
        form: of the magnitude.
        batch_size: prompt and seed pairs per evaluation (which then holds up to twice as many images). Whole prompts,
            as many as fit.
        bar: told of each pair that is done.

    Raises:
        UsageError: no prompt, no seed, an unknown signal, or ``steps`` out of range.
    """
    scoring = Scoring(
        pipe,
        prompts,
        steps=steps,
        num_inference_steps=num_inference_steps,
        seeds=seeds,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        signals=signals,
        form=form,
        batch_size=batch_size,
    )
    found = []
    for group in scoring.groups():
        found += group
        if bar is not None:
            bar.update(sum(len(one.seeds) for one in group))
    return Scores.of(found, scoring.timesteps, scoring.shared_evaluations)


class Scoring:
    """The loop of :func:`score`, one group of prompts after the other; the arguments are those of :func:`score`.

    Attributes:
        timesteps: the steps that are looked at.
        group: prompts that are scored together.
        shared_evaluations: those that prompts share, counted in single images.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        prompts: Sequence[str],
        *,
        steps: int,
        num_inference_steps: int,
        seeds: int | Sequence[int] | NDArray[np.int64],
        guidance_scale: float,
        negative_prompt: str = "",
        signals: Sequence[str | Signal],
        form: Form,
        batch_size: int,
    ) -> None:
        table = np.arange(seeds) if isinstance(seeds, int) else np.asarray(seeds, np.int64)
        self.seeds = np.broadcast_to(table, (len(prompts), table.shape[-1]))
        check_scored_steps(steps, num_inference_steps, batch_size)
        if self.seeds.size == 0:
            raise UsageError("nothing to score: there must be at least one prompt and one seed")
        self.signals = find_signals(signals, form, self.seeds.shape[1])
        self.denoiser, self.prompts, self.batch_size = denoiser_of(pipe), prompts, batch_size
        self.group = max(1, batch_size // self.seeds.shape[1])
        self.guidance_scale = guidance_scale

        schedule = self.denoiser.schedule
        if not any(signal.looks_at == "every step" for signal in self.signals):
            steps = int(any(signal.looks_at == "first step" for signal in self.signals))
        self.timesteps = schedule.steps(num_inference_steps)[:steps]
        levels = {signal.noise_level for signal in self.signals if signal.noise_level is not None}
        last = schedule.timesteps - 1
        self.noise_levels = {level: min(round(level * (last + 1)), last) for level in sorted(levels, reverse=True)}
        self.empty = self.denoiser.encode([negative_prompt])
        masked = any(getattr(signal, "end_attention", False) for signal in self.signals)
        self.ends = end_positions(pipe, prompts) if masked else None

        shared = list(dict.fromkeys(self.seeds.ravel().tolist()))
        # All of them in one batch, the same at every start; more would be work for prompts that are not scored.
        self.shared_seeds = shared if len(shared) <= batch_size and self.seeds.size > len(shared) else []
        self._shared: dict[int, Prediction] = {}
        moments = [len(self.timesteps) > 1 or needs_unconditional(self._watching(0))]
        moments += [needs_unconditional(self._on_noise(level)) for level in self.noise_levels]
        self.shared_evaluations = len(self.shared_seeds) * sum(moments)

    def groups(self, start: int = 0) -> Iterator[list[PromptScore]]:
        """The prompts' scores in order, in lists of ``group`` (the last may be shorter).

        What a group gives does not depend on the groups before it: begun later, the loop gives the same numbers, on the
        same machine to the last bit.

        Args:
            start: prompts to skip, a multiple of ``group``.

        Raises:
            UserError: a prediction is not finite.
        """
        for first in range(start, len(self.prompts), self.group):
            yield self._score(range(first, min(first + self.group, len(self.prompts))))

    @torch.no_grad()
    def _score(self, rows: range) -> list[PromptScore]:
        pairs = [(row, int(seed)) for row in rows for seed in self.seeds[row]]
        encoded = self.denoiser.encode([self.prompts[row] for row in rows])
        observed: dict[str, list[Tensor]] = {signal.name: [] for signal in self.signals}
        evaluations = 0
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            at = torch.tensor([row - rows.start for row, _ in batch], device=self.denoiser.device)
            ends = None if self.ends is None else self.ends[[row for row, _ in batch]]
            found, spent = self._follow([seed for _, seed in batch], encoded[at], ends)
            evaluations += spent
            for name, part in found.items():
                observed[name].append(part)
        columns = self.seeds.shape[1]
        whole = {name: torch.cat(parts).unflatten(0, (len(rows), columns)) for name, parts in observed.items()}
        result = []
        for number, row in enumerate(rows):
            seen = {name: one[number] for name, one in whole.items()}
            values = {signal.name: signal.combine(seen[signal.name]) for signal in self.signals}
            if not all(value.isfinite().all() for value in values.values()):
                raise UserError(
                    f"prompt {self.prompts[row]!r}: the model's predictions are not finite; try dtype float32"
                )
            result.append(
                PromptScore(
                    row,
                    self.seeds[row].tolist(),
                    {name: value.tolist() for name, value in values.items()},
                    {signal.name: float(signal.of_prompt(values[signal.name])) for signal in self.signals},
                    {name: value.tolist() for name, value in seen.items() if value.ndim == 2},
                    evaluations // len(rows),
                )
            )
        return result

    def _follow(
        self, seeds: Sequence[int], cond: Conditioning, ends: Tensor | None = None
    ) -> tuple[dict[str, Tensor], int]:
        """Observations ``[n, observations, …]`` of each signal, and the evaluations that they took.

        ``ends [n]`` is where the prompts' end tokens stand, if their attention is asked for.
        """
        denoiser, schedule = self.denoiser, self.denoiser.schedule
        x_t = noise = denoiser.noise(seeds)
        observed: dict[str, list[Tensor]] = {signal.name: [] for signal in self.signals}
        evaluations = 0

        def look(t: int, watching: Sequence[Signal], first: bool, guided: bool, on_noise: bool = False) -> Prediction:
            """Evaluate at ``t``, show the signals, and return the guided output (the conditional one without need)."""
            nonlocal evaluations
            unconditional = guided or needs_unconditional(watching)
            shared = self._unconditional(t, seeds) if unconditional and first else None
            maps = any(signal.attention for signal in watching)
            double = unconditional and shared is None
            both = Conditioning.join([self.empty.expand(len(x_t)), cond]) if double else cond
            end = ends if not on_noise and t == self.timesteps[-1] else None
            network, n = denoiser.network, len(x_t)
            with (
                recorded_attention(network, n, mean_attention) if maps else nullcontext() as recorded,
                recorded_attention(network, n, end_share(end)) if end is not None else nullcontext() as at_end,
            ):
                seen_both = denoiser.predict(torch.cat([x_t, x_t]) if double else x_t, t, both)
            evaluations += len(seen_both.output)
            own = seen_both[-len(x_t) :]
            other = shared if shared is not None else seen_both[: len(x_t)] if double else None
            seen = Seen(
                own.x_t,
                t,
                own.at,
                own.compared,
                None if other is None else other.compared,
                {} if recorded is None else recorded.layers,
                on_noise,
                None if at_end is None else as_map(finest_down_layers(at_end.layers), x_t.shape[2:]),
            )
            for signal in watching:
                observed[signal.name].append(signal.observe(seen).float())
            return own if other is None else denoiser.guided(own, other, self.guidance_scale)

        for step, t in enumerate(self.timesteps):
            last = step + 1 == len(self.timesteps)
            guided = look(t, self._watching(step), first=step == 0, guided=not last)
            if not last:
                x_t = schedule.step(guided, self.timesteps[step + 1]).to(denoiser.dtype)
        x_t = noise
        for level, t in self.noise_levels.items():
            look(t, self._on_noise(level), first=True, guided=False, on_noise=True)
        return {name: torch.stack(values, dim=1) for name, values in observed.items()}, evaluations

    def _watching(self, step: int) -> list[Signal]:
        which = ("every step", "first step") if step == 0 else ("every step",)
        return [signal for signal in self.signals if signal.looks_at in which]

    def _on_noise(self, level: float) -> list[Signal]:
        return [signal for signal in self.signals if signal.noise_level == level]

    def _unconditional(self, t: int, seeds: Sequence[int]) -> Prediction | None:
        """The prediction for each seed's initial noise without a prompt, where prompts share their seeds."""
        if not self.shared_seeds:
            return None
        if t not in self._shared:
            noise = self.denoiser.noise(self.shared_seeds)
            self._shared[t] = self.denoiser.predict(noise, t, self.empty.expand(len(noise)))
        return self._shared[t][[self.shared_seeds.index(seed) for seed in seeds]]


def needs_unconditional(signals: Sequence[Signal]) -> bool:
    """Whether one of them reads the prediction without a prompt."""
    return any(signal.unconditional for signal in signals)


def mean_attention(maps: Tensor) -> Tensor:
    """``[n, heads, latents, tokens]`` → ``[n, tokens]``."""
    return maps.mean((1, 2))

