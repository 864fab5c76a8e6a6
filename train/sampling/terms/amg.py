"""Anti-memorization guidance (AMG): steer away from the nearest training image, only where an image comes
close to one.

Source: Chen, Liu, Xu, "Towards Memorization-Free Diffusion Models" (CVPR 2024, arXiv 2404.00922), equations
10 to 17. With ``σ_t`` the similarity of ``x̂_0`` to its nearest training sample ``n_0``, and only where ``σ_t
> λ_t``:

    ε̂ ← ε̂ + G_spe + G_dup + G_sim
    G_spe = − s_1 (ε(x_t,e_p) − ε(x_t,e_∅)),   s_1 = max(min(c_1 σ_t, s_0 − 1), 0)
    G_dup = − s_2 (ε(x_t,e_N) − ε(x_t,e_∅)),   s_2 = max(min(c_2 σ_t, s_0 − s_1 − 1), 0)
    G_sim = c_3 √(1−ᾱ_t) ∇_{x_t} σ_t

Where other terms changed the guidance scale before it, their scale is its ``s_0``: 1 is what all together leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afresh.errors import UsageError
from train.denoising.conditioning import Conditioning
from train.denoising.predictions import to_x0
from train.sampling.config import AMGConfig
from train.sampling.guidance import Correction, Part, Run, State, StepFunction
from train.sampling.similarity import Nearest, PixelIndex, Similarity, View, Views, object_level
from train.sampling.terms.amg_strengths import (
    TIMESTEPS,
    antithesis,
    deduplication_strength,
    despecification_strength,
    dissimilarity_factor,
    floor_left,
    schedule,
)
from train.sampling.terms.random_edits import random_edits

if TYPE_CHECKING:
    from curate.embed.protocol import Embedder
    from curate.index.training_index import TrainingIndex


class AMG:
    """Anti-memorization guidance, a :class:`~train.sampling.guidance.Guidance` term.

    The trace gets ``similarity`` (calibrated), ``cosine`` (of pixels: ``distance``), ``nearest`` (row of the index),
    ``threshold``; and
    for images that are guided ``s_1``, ``s_2``, ``caption`` (e_N), and ``similarity_after`` (G_spe and
    G_dup), ``factor`` (of ∇σ) and ``gradient_norm`` (of ∇σ, before any normalisation). None where nothing was
    measured.

    Args:
        index: the training set, as curation left it; or its pixels.
        embedder: the image embedder that the index was built with; none for pixels.
        config: settings, or a preset's name; None is the preset of the index's kind, main or pixels.
        views: further ``(index, embedder)`` of the same images (:mod:`curate.stages.views`), where the settings ask for
            them: the highest similarity of all is what is watched and steered down.
        overrides: fields of :class:`AMGConfig` to set otherwise.

    Raises:
        UserError: the index is empty or was built with another embedder.
        UsageError: an option is wrong; names it.
    """

    name = "amg"

    def __init__(
        self,
        index: TrainingIndex | PixelIndex,
        embedder: Embedder | None = None,
        config: AMGConfig | str | None = None,
        *,
        views: Sequence[View] = (),
        **overrides: Any,
    ) -> None:
        pixels = isinstance(index, PixelIndex)
        if config is None or isinstance(config, str):
            config = AMGConfig(preset=config or ("pixels" if pixels else "main"))  # type: ignore[arg-type]
        try:
            self.config = replace(config, **overrides).resolved()
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error
        if pixels != (self.config.preset == "pixels"):
            raise UsageError(f"amg.preset {self.config.preset} is not on the scale of this index")
        self.similarity: Similarity
        if isinstance(index, PixelIndex):
            self.similarity = index
        elif embedder is None:
            raise UsageError("AMG needs the embedder that the index was built with")
        else:
            self.similarity = object_level(index, embedder, views if self.config.views else ())
        self.index, self.embedder, self.views = index, embedder, views
        self.threshold = schedule(self.config)

    def start(self, run: Run) -> StepFunction:
        """Begin one run; see :class:`~train.sampling.guidance.Guidance`."""
        nothing = torch.zeros(run.batch_size, dtype=torch.bool)
        memory = _Memory(nothing.clone(), nothing.clone(), torch.zeros(run.batch_size))
        return lambda state: self._step(state, memory)

    def _step(self, state: State, memory: _Memory) -> Correction | None:
        t = state.t * TIMESTEPS / state.run.train_timesteps
        config = self.config
        assert config.t_range is not None and config.sim_t_range is not None and config.release is not None
        if not config.t_range[0] <= t <= config.t_range[1]:
            return None
        trace = _Columns(state.run.batch_size, self.threshold(t), self.similarity.raw_name)
        # Images being guided are measured at every step, the others at each k-th.
        due = memory.guided | ~memory.measured | (state.number % config.every == 0)
        rows = due.nonzero().flatten().to(state.x_t.device)
        if not len(rows):
            return Correction(columns=trace.values)
        sigma, raw, nearest = self._measure(state, rows)
        # Hysteresis: what is guided is let go further down than where guidance began.
        threshold = torch.full_like(sigma[:, 0], trace.threshold)
        threshold[memory.guided[due].to(sigma.device)] -= config.release
        acts = sigma[:, 0] > threshold
        found: dict[str, Any] = {"similarity": sigma[:, 0], "nearest": nearest[:, 0]}
        found[self.similarity.raw_name] = raw[:, 0]
        if isinstance(self.similarity, Views):
            found["view"], found["nearest"] = self.similarity.of(nearest[:, 0])
        trace.fill(rows, threshold=threshold, **found)
        memory.measured[due] = True
        memory.guided[due] = acts.cpu()
        memory.count(t, memory.guided & due, (sigma[acts, 0] > trace.threshold).cpu())
        if not acts.any():
            return Correction(columns=trace.values)

        above = sigma > threshold[:, None]
        near = [row[s].tolist() for row, s in zip(nearest[acts], above[acts], strict=True)]
        zeros = torch.zeros_like(sigma[acts, 0])
        image = _Guided(rows[acts], sigma[acts, 0], threshold[acts], near, s_1=zeros, s_2=zeros)
        image.floor = floor_left(memory.above[memory.guided & due].to(sigma.device), config)
        parts = {}
        if state.eps_uncond is not None:  # without classifier-free guidance there is nothing to take back
            if config.despecification:
                parts["despecification"] = self._despecification(state, image)
            if config.deduplication:
                parts["deduplication"] = self._deduplication(state, image, memory, trace)
        trace.fill(image.rows, s_1=image.s_1, s_2=image.s_2)
        if config.dissimilarity and config.sim_t_range[0] <= t <= config.sim_t_range[1]:
            eps_hat = state.eps_hat
            for part in parts.values():
                eps_hat = eps_hat.index_add(0, part.rows, part.delta)
            parts["dissimilarity"] = self._dissimilarity(state, image, eps_hat[image.rows], t, trace)
        return Correction(parts, trace.values)

    def _measure(self, state: State, rows: Tensor) -> Nearest:
        """The ``k`` nearest training samples of ``x̂_0``."""
        k = self.config.neighbours if self.config.deduplication else 1
        found = [
            self.similarity.nearest(self._decode(state, state.x0(chunk)), k)
            for chunk in rows.split(self.config.decode_slice)
        ]
        return Nearest(*(torch.cat(columns) for columns in zip(*found, strict=True)))

    def _decode(self, state: State, latents: Tensor) -> Tensor:
        return state.preview(latents) if self.config.decoder == "linear" else state.decode(latents)

    def _despecification(self, state: State, image: _Guided) -> Part:
        """G_spe (eq. 14)."""
        assert state.eps_uncond is not None
        scale, config = state.scale[image.rows], self.config
        image.s_1 = despecification_strength(image.sigma, scale, config.c_1, image.floor, config.c_1_at)
        rows, s_1 = image.rows[image.s_1 > 0], image.s_1[image.s_1 > 0]
        return Part(rows, -_broadcast(s_1) * (state.eps_cond[rows] - state.eps_uncond[rows]), -s_1)

    def _deduplication(self, state: State, image: _Guided, memory: _Memory, trace: _Columns) -> Part:
        """G_dup (eq. 16)."""
        assert state.eps_uncond is not None and state.uncond is not None
        config = self.config
        scale = state.scale[image.rows]
        image.s_2 = deduplication_strength(image.sigma, scale, image.s_1, config.c_2, image.floor)
        acts = image.s_2 > 0
        rows, s_2 = image.rows[acts], image.s_2[acts]
        image.near_cond = state.uncond[image.rows]
        if not len(rows):
            return Part(rows, state.x_t[rows])
        captions = [
            antithesis(self.similarity.captions, self.similarity.counts, near, config.min_count)
            for near, act in zip(image.near, acts.tolist(), strict=True)
            if act
        ]
        trace.fill(rows, caption=captions)
        for caption in captions:
            if caption not in memory.encoded:
                memory.encoded[caption] = state.encode_prompts([caption])
        e_N = Conditioning.join([memory.encoded[caption] for caption in captions])
        image.near_cond = image.near_cond.put(acts.nonzero().flatten(), e_N)
        eps_near = self._near_noise(state, e_N, rows)
        return Part(rows, -_broadcast(s_2) * (eps_near - state.eps_uncond[rows]), -s_2)

    @staticmethod
    def _near_noise(state: State, e_N: Conditioning, rows: Tensor) -> Tensor:
        """``ε(x_t, e_N)``: known already where the prompt is that caption, as of a memorized image it mostly is."""
        assert state.cond is not None
        own = e_N.same_text(state.cond[rows])
        eps_near = state.eps_cond[rows]
        if not own.all():
            eps_near[~own] = state.denoise(state.x_t[rows[~own]], e_N[~own], rows[~own])
        return eps_near

    def _dissimilarity(self, state: State, image: _Guided, eps_hat: Tensor, t: float, trace: _Columns) -> Part:
        """G_sim (eq. 17), where ``σ`` measured again after G_spe and G_dup is still above λ_t."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.step)
        edits = generator.get_state()
        found = []
        for chunk in torch.arange(len(image.rows), device=eps_hat.device).split(config.decode_slice):
            generator.set_state(edits)  # the same edits whatever the slice
            found.append(self._gradient(state, image.take(chunk), eps_hat[chunk], generator))
        sigma, gradient = (torch.cat(columns) for columns in zip(*found, strict=True))
        norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        factor = dissimilarity_factor(sigma, t, state.alpha_bar, image.threshold, config)
        trace.fill(image.rows, similarity_after=sigma, factor=factor, gradient_norm=norm)
        # A gradient that is not finite, or nought, says nothing: leave the image to the other terms.
        acts = (sigma > image.threshold) & torch.isfinite(norm) & (norm > 0)
        if config.normalise:
            factor = factor * torch.linalg.vector_norm(eps_hat.flatten(1), dim=1) / norm
        no_text = torch.zeros_like(factor[acts])
        return Part(image.rows[acts], _broadcast(factor[acts]) * gradient[acts], no_text)

    def _gradient(
        self, state: State, image: _Guided, eps_hat: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """``σ`` of ``x̂_0`` under ``eps_hat``, and ``∇_{x_t} σ``, the mean over the image and its edits."""
        with torch.inference_mode(False), torch.enable_grad():
            x_t = state.x_t[image.rows].clone().requires_grad_()
            eps_hat = eps_hat.clone()
            if self.config.through_unet:  # the same value, with its dependence on x_t
                again = self._text_guided(state, image, x_t)
                eps_hat = eps_hat + again - again.detach()
            pixels = self._decode(state, to_x0(eps_hat, x_t, state.at, state.space))
            sigma, nearest = self.similarity.against(pixels)
            views = [sigma]
            for edited in random_edits(pixels, self.config.edits, generator):
                views.append(self.similarity.against(edited, nearest)[0])
            mean = torch.stack(views).mean(0)
            gradient = torch.autograd.grad(mean.sum(), x_t)[0] if mean.requires_grad else torch.zeros_like(x_t)
        return sigma.detach(), gradient.detach()

    @staticmethod
    def _text_guided(state: State, image: _Guided, x_t: Tensor) -> Tensor:
        """``ε̂`` as a function of ``x_t``: classifier-free guidance, G_spe and G_dup at their strengths."""
        cond = None if state.cond is None else state.cond[image.rows].clone()
        eps_cond = state.denoise(x_t, cond, image.rows)
        if state.uncond is None:
            return eps_cond
        eps_uncond = state.denoise(x_t, state.uncond[image.rows].clone(), image.rows)
        eps_hat = eps_uncond + _broadcast(state.scale[image.rows] - image.s_1) * (eps_cond - eps_uncond)
        if image.near_cond is not None and (image.s_2 > 0).any():
            eps_near = state.denoise(x_t, image.near_cond.clone(), image.rows)
            eps_hat = eps_hat - _broadcast(image.s_2) * (eps_near - eps_uncond)
        return eps_hat


@dataclass
class _Memory:
    """What one run remembers: flags of each image ``[n]``, on the CPU, and encoded captions."""

    measured: Tensor
    guided: Tensor
    above: Tensor
    """Timesteps, of 1000, for which guidance has not brought an image below λ_t."""
    last: float | None = None
    encoded: dict[str, Conditioning] = field(default_factory=dict)

    def count(self, t: float, rows: Tensor, above: Tensor) -> None:
        """Count the time since the last look for those of the guided images ``rows [n]`` that are ``above [k]``."""
        since = 0.0 if self.last is None else max(self.last - t, 0.0)
        self.above[rows] += since * above
        self.last = t


@dataclass
class _Guided:
    """The images that are guided at a step."""

    rows: Tensor
    """``[k]``, in the batch."""
    sigma: Tensor
    """``[k]``, above the threshold."""
    threshold: Tensor
    """``[k]``: λ_t, less what the config's ``release`` takes off."""
    near: list[list[int]]
    """Of each, the training samples nearer than the threshold, nearest first: rows of the index."""
    s_1: Tensor
    s_2: Tensor
    near_cond: Conditioning | None = None
    """Of k images: e_N; the empty prompt's where ``s_2`` is 0."""
    floor: Tensor | float = 1.0
    """``[k]``: the guidance scale that is left at least."""

    def take(self, positions: Tensor) -> _Guided:
        """Some of them."""
        near = [self.near[i] for i in positions.tolist()]
        near_cond = None if self.near_cond is None else self.near_cond[positions]
        return _Guided(
            self.rows[positions],
            self.sigma[positions],
            self.threshold[positions],
            near,
            self.s_1[positions],
            self.s_2[positions],
            near_cond,
        )


class _Columns:
    """The term's trace columns at one step: one value an image, None until filled."""

    _NAMES = (
        "similarity",
        "nearest",
        "view",
        "s_1",
        "s_2",
        "caption",
        "similarity_after",
        "factor",
        "gradient_norm",
    )

    def __init__(self, batch_size: int, threshold: float, raw_name: str) -> None:
        self.threshold = threshold
        self.values: dict[str, list[Any]] = {"threshold": [threshold] * batch_size}
        self.values.update((name, [None] * batch_size) for name in (raw_name, *self._NAMES))

    def fill(self, rows: Tensor, **values: Tensor | Sequence[Any]) -> None:
        images = rows.tolist()
        for name, column in values.items():
            items = column.tolist() if isinstance(column, Tensor) else column
            for image, value in zip(images, items, strict=True):
                self.values[name][image] = value


def _broadcast(values: Tensor) -> Tensor:
    """``[k]`` → ``[k, 1, 1, 1]``."""
    return values.view(-1, 1, 1, 1)

