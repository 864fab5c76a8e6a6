"""The guidance protocol: what a guidance term sees at a denoising step, and what it gives back.

A term is a small object that holds its settings. When sampling begins, the pipeline calls ``start(run)``,
which returns the function to call at every step; what a term remembers from step to step lives there, so one
term can serve any number of runs. At each step the function sees a :class:`State` and returns a
:class:`Correction` of ``ε̂``, or None.

    class LessGuidance:
        name = "less"

        def start(self, run: Run) -> StepFunction:
            def step(state: State) -> Correction | None:
                rows = torch.arange(run.batch_size, device=state.x_t.device)
                less = -torch.ones(len(rows))
                return Correction({"less": Part(rows, -(state.eps_cond - state.eps_uncond), less)})

            return step

A term may also have ``prepare(start)``, which is called once before the first step, sees a :class:`Start`, and may
change what the denoiser starts from: the noise, or the conditioning (:class:`Change`).

Corrections and changes name the images that they change. All others keep every bit of what the stock pipeline would
have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from train.denoising.coefficients import Coefficients
from train.denoising.conditioning import Conditioning
from train.denoising.predictions import to_x0

# Below this, x̂_0 = (x_t − √(1−ᾱ_t)·ε̂)/√ᾱ_t has no usable precision (the first step of zero-terminal-SNR
# models).
MIN_ALPHA_BAR = 1e-6


@dataclass(frozen=True)
class Run:
    """What stays the same during one call of the pipeline."""

    batch_size: int
    """Images drawn together, all prompts and images per prompt."""
    train_timesteps: int
    """Length of the schedule that the model was trained with; ``t`` counts down from it."""
    decode: Callable[[Tensor], Tensor]
    """Latents ``[n, c, h, w]`` → pixels ``[n, 3, H, W]`` in [0, 1]; differentiable, in float32."""
    encode_prompts: Callable[[Sequence[str]], Conditioning]
    """Texts → conditioning, cut at the tokenizer's limit, encoded as the call's own prompts are. Of a class-conditional
    model: names of classes → labels."""
    tokenizer: Any = None
    """Of a text-conditional model."""
    preview: Callable[[Tensor], Tensor] | None = None
    """Much cheaper than ``decode``, and nearly the same; None where decoding costs nothing."""


@dataclass(frozen=True)
class State:
    """One denoising step, in ε-space and float32 whatever the model predicts and computes in; for flow-matching models
    in the space of velocities, see :attr:`space`.

    ``x_t`` is variance preserving, or flow matching's ``(1−σ) x_0 + σ ε``: schedulers that keep latents as ``x_0 +
    σ·noise`` are scaled to ``√ᾱ_t·x_0 + √(1−ᾱ_t)·noise``, which is also what the denoiser is given.
    """

    run: Run
    step: int
    """Of the evaluations, from 0; a second-order scheduler has two a step. :attr:`number` counts steps."""
    t: float
    at: Coefficients
    """Of ``x_t``: ``x_t = signal · x_0 + noise · ε``."""
    guidance_scale: float
    """``s_0``, as it was asked for; see :attr:`scale`."""
    x_t: Tensor
    """``[n, c, h, w]``."""
    eps_uncond: Tensor | None
    """``ε(x_t, e_∅)``, or the negative prompt's; None without classifier-free guidance."""
    eps_cond: Tensor
    """``ε(x_t, e_p)``; of an unconditional model ``ε(x_t)``."""
    eps_hat: Tensor
    """``ε̂``: classifier-free guidance and the corrections of the terms before this one."""
    uncond: Conditioning | None
    cond: Conditioning | None
    """Of each image, without and with the prompt or class; None of an unconditional model. Lengths may differ."""
    denoise: Callable[[Tensor, Conditioning | None, Tensor], Tensor] = field(repr=False)
    """``(x_t [k, …], conditioning of k images, rows [k]) → ε [k, …]`` float32 at this step's ``t`` for the images
    ``rows``, whose image prompts hold; differentiable where gradients are enabled."""
    refines: bool = False
    """Whether this evaluation begins no step of the trajectory: it refines one that was begun before
    (:func:`~train.denoising.schedules.refines_a_step`), or repeats its timestep."""
    space: str = "epsilon"
    """What ``eps_uncond``, ``eps_cond``, ``eps_hat`` and ``denoise`` are: ε̂, or of flow-matching models the
    ``velocity``, which then stands where ``ε`` is written
    (:attr:`~train.denoising.predictions.Prediction.compared`)."""
    refined: int = 0
    """How many evaluations did so, up to this one."""
    scale: Tensor = None  # type: ignore[assignment]
    """``[n]`` float32: the effective guidance scale of each image, ``s_0`` and what the terms before this one added to
    it and took from it. A term that is to leave a certain scale goes by this one."""

    def __post_init__(self) -> None:
        if self.scale is None:
            scale = torch.full((len(self.x_t),), self.guidance_scale, dtype=torch.float32, device=self.x_t.device)
            object.__setattr__(self, "scale", scale)

    @property
    def number(self) -> int:
        """Of the trajectory's step, from 0: evaluations that refine a step have its number."""
        return self.step - self.refined

    @property
    def alpha_bar(self) -> float:
        """``ᾱ_t``."""
        return self.at.alpha_bar

    def x0(self, rows: Tensor | None = None, eps_hat: Tensor | None = None) -> Tensor:
        """``x̂_0 = (x_t − √(1−ᾱ_t)·ε̂) / √ᾱ_t`` of the images ``rows``, for another ``ε̂`` if given."""
        x_t = self.x_t if rows is None else self.x_t[rows]
        if eps_hat is None:
            eps_hat = self.eps_hat if rows is None else self.eps_hat[rows]
        return to_x0(eps_hat, x_t, self.at, self.space)

    def decode(self, latents: Tensor) -> Tensor:
        """See :attr:`Run.decode`."""
        return self.run.decode(latents)

    def preview(self, latents: Tensor) -> Tensor:
        """See :attr:`Run.preview`."""
        return (self.run.preview or self.run.decode)(latents)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """See :attr:`Run.encode_prompts`."""
        return self.run.encode_prompts(prompts)


class Part(NamedTuple):
    """One addend of ``ε̂`` for some images."""

    rows: Tensor
    """``[k]`` int64: which images; no image twice."""
    delta: Tensor
    """``[k, c, h, w]`` float32, added to their ``ε̂``."""
    scale: Tensor | None = None
    """``[k]``: what it adds to their guidance scale, 0 of what is no guidance by a text. None has it measured: the
    component of ``delta`` along ``ε(x_t, e_p) − ε(x_t, e_∅)``."""


@dataclass
class Correction:
    """What a term does at a step."""

    parts: dict[str, Part] = field(default_factory=dict)
    """Name → addend. The name is what the trace lists as fired for the part's images."""
    columns: Mapping[str, Sequence[Any] | Tensor] = field(default_factory=dict)
    """Trace column → one value an image, ``[n]``."""


StepFunction = Callable[[State], Correction | None]


@dataclass(frozen=True)
class Start:
    """What the images start from, in the space of :class:`State`."""

    run: Run
    t: float
    """The first timestep."""
    at: Coefficients
    noise: Tensor
    """``[n, c, h, w]`` float32: ``x_T`` as it was drawn, whatever the terms before this one made of it."""
    x_t: Tensor
    """``x_T`` as the terms before this one left it."""
    uncond: Conditioning | None
    cond: Conditioning | None
    """As in :class:`State`."""
    prompts: Sequence[str] | None
    """Of each image, as the terms before this one left them; None where only embeddings were given."""
    denoise: Callable[[Tensor, Conditioning | None, Tensor], Tensor] = field(repr=False)
    """As in :class:`State`."""
    denoise_at: Callable[[int], Callable[[Tensor, Conditioning | None, Tensor], Tensor]] | None = field(
        default=None, repr=False
    )
    """A timestep of the model's schedule → the same there."""

    def generator(self, image: int, salt: str) -> torch.Generator:
        """Random numbers of one image's own, on the CPU: a function of its noise, as drawn, and of ``salt``.

        An image's noise follows from its seed alone, so what a term draws here does not depend on what the image was
        batched with, and takes nothing from the generators that draw the noise of later steps.
        """
        digest = hashlib.sha256(self.noise[image].cpu().contiguous().numpy().tobytes() + salt.encode())
        return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7], "little"))


@dataclass
class Change:
    """What a term's ``prepare`` changes."""

    rows: Tensor
    """``[k]`` int64: which images; no image twice."""
    x_t: Tensor | None = None
    """``[k, c, h, w]`` float32: their new ``x_T``."""
    cond: Conditioning | None = None
    """Of k images: their new conditioning."""
    prompts: Sequence[str] | None = None
    """Of all n images, where ``cond`` encodes other texts than before."""
    columns: Mapping[str, Sequence[Any] | Tensor] = field(default_factory=dict)
    """Trace column of the first step → one value an image, ``[n]``."""


class Guidance(Protocol):
    """A guidance term. ``name`` tells its trace columns from another term's where both have the same.

    ``prepare(start: Start) -> Change | None`` is optional.
    """

    name: str

    def start(self, run: Run) -> StepFunction:
        """Begin one run of the pipeline; the function returned is called once a step."""
        ...


def guide(
    terms: Iterable[tuple[str, StepFunction]], state: State
) -> tuple[Tensor, dict[str, Part], dict[str, Sequence[Any] | Tensor]]:
    """Apply terms in order, each seeing the ``ε̂`` and the effective guidance scale that the ones before it left.

    Returns:
        ``ε̂`` ``[n, c, h, w]``, the parts by name, and the trace columns. A name that two terms share is told
        apart as ``term.name``. Where ``ε̂`` is guided and was changed there is the column ``scale``, what is left.
    """
    parts: dict[str, Part] = {}
    columns: dict[str, Sequence[Any] | Tensor] = {}
    for name, step in terms:
        correction = step(state)
        if correction is None:
            continue
        eps_hat, scale = state.eps_hat, state.scale
        for part_name, part in correction.parts.items():
            if len(part.rows):
                eps_hat = eps_hat.index_add(0, part.rows, part.delta)
                scale = scale.index_add(0, part.rows, _scale_of(part, state))
                parts[_free(parts, name, part_name)] = part
        for column, values in correction.columns.items():
            columns[_free(columns, name, column)] = values
        state = replace(state, eps_hat=eps_hat, scale=scale)
    if parts and state.eps_uncond is not None:
        columns[_free(columns, "effective", "scale")] = state.scale
    return state.eps_hat, parts, columns


def _scale_of(part: Part, state: State) -> Tensor:
    """``[k]``: see :attr:`Part.scale`."""
    if part.scale is not None:
        return part.scale.to(state.scale)
    if state.eps_uncond is None:
        return torch.zeros_like(state.scale[part.rows])
    direction = (state.eps_cond[part.rows] - state.eps_uncond[part.rows]).flatten(1)
    length = direction.square().sum(1)
    along = (part.delta.flatten(1) * direction).sum(1) / length
    return torch.where(length > 0, along, 0.0).to(state.scale)


def _free(taken: Mapping[str, Any], term: str, name: str) -> str:
    return name if name not in taken else f"{term}.{name}"

