"""The first denoising step of a prompt from several noises, with any neurons blocked: similarity and magnitude."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from afresh.errors import UsageError, printable
from afresh.progress import Progress
from train.denoising.conditioning import Conditioning
from train.denoising.families.registry import denoiser_of
from train.memorization.neurons.blocking import gates
from train.memorization.neurons.value_neurons import widths
from train.memorization.signals.magnitude import magnitude
from train.memorization.signals.ssim import ms_ssim, rescaled

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


Criterion = Literal["similarity", "magnitude", "selective"]
STEPS = (0, 10, 20)
"""Of 50 DDIM steps, where the magnitude is taken; the similarity is taken at the first."""


class FirstStep:
    """The first denoising step of one prompt from several noises, with any neurons blocked in each row of a batch.

    Args:
        pipe: Stable Diffusion.
        caption: the prompt.
        seeds: of the initial noises.
        layers: whose neurons can be blocked.
        batch_size: images per UNet pass.
        bar: told of each pass: a prompt's search takes many.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        caption: str,
        seeds: Sequence[int],
        *,
        layers: Mapping[str, nn.Module] | None = None,
        batch_size: int = 32,
        bar: Progress | None = None,
    ):
        if len(set(seeds)) < 2:
            raise UsageError(f"seeds are {list(seeds)}: a score among seeds needs at least two")
        self.denoiser, self.layers, self.batch_size = denoiser_of(pipe), dict(layers or {}), batch_size
        self.splits = np.cumsum([0, *widths(self.layers).values()])
        timesteps = self.denoiser.schedule.steps(50)
        self.timesteps = [timesteps[step] for step in STEPS]
        self.x_T = self.denoiser.noise(seeds)
        both = self.denoiser.encode(["", caption]).to(dtype=self.denoiser.dtype)
        self.empty, self.prompt = both[:1], both[1:]
        self.caption, self.bar = caption, bar
        self.evaluations = 0
        self._unblocked: Tensor | None = None

    def eps(self, rows: Sequence[int], factors: Tensor | None, cond: Conditioning, t: int) -> Tensor:
        """``ε(x_T, e)`` of some seeds at timestep t, differentiable in the factors.

        Args:
            rows: seeds, by position.
            factors: ``[rows, units]``, 0 for the neurons that are blocked in a row; None blocks none.
            cond: of one image.
        """
        self.evaluations += len(rows)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.evaluations} evaluations for {printable(self.caption[:40])!r}")
        x = self.x_T[list(rows)]
        with gates(self.layers) as gate:
            if factors is not None:
                for number, name in enumerate(self.layers):
                    gate[name] = factors[:, None, self.splits[number] : self.splits[number + 1]]
            return self.denoiser.predict(x, t, cond).compared

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
        parts = [[self.eps(rows, factors, one, t) for one in (self.prompt, self.empty)] for t in self.timesteps]
        return torch.stack([magnitude(cond, uncond) for cond, uncond in parts]).mean(dim=0)

    def scores(self, criterion: Criterion) -> NDArray[np.float32]:
        """How memorized each seed is, with no neuron blocked: ``[seeds]``.

        By similarity it is the highest MS-SSIM of its difference to another seed's (§3.1), else its magnitude.
        """
        rows = list(range(len(self.x_T)))
        if criterion != "similarity":
            with torch.no_grad():
                return self._batched(lambda part: self.magnitude(part, None), rows).cpu().numpy()
        first, second = np.triu_indices(len(rows), 1)
        among = np.zeros((len(rows), len(rows)), np.float32)
        among[first, second] = ms_ssim(self.unblocked[first], self.unblocked[second]).cpu().numpy()
        return np.maximum(among, among.T).max(axis=1)

    def _batched(self, function: Callable[[Sequence[int]], Tensor], rows: Sequence[int]) -> Tensor:
        size = self.batch_size
        return torch.cat([function(rows[start : start + size]) for start in range(0, len(rows), size)])

