"""How much each value neuron matters to captions that are not memorized: what blocking it would cost them.

A neuron by which a prompt's magnitude grows may carry that prompt's image, or what all captions need. Its
*sensitivity* tells the two apart: ``s_n = (E ‖∂ε(x_t, e_c; g)/∂g_n‖²)^½`` over clean captions c, noises and timesteps,
where ``g_n`` is the factor on the neuron's output. To first order blocking a set N changes a clean caption's prediction
by at most ``Σ s_n``, and lowers the magnitude by ``Σ ∂m/∂g_n``; so the sets that give most for what they cost take the
neurons in the order of ``∂m/∂g_n / s_n``.

The norm of the whole Jacobian's column is estimated without computing it (Hutchinson): with r of independent standard
normals, ``E_r (∂⟨r, ε⟩/∂g_n)² = ‖∂ε/∂g_n‖²``. One backward pass gives it for all neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from train.denoising.families.registry import denoiser_of
from train.memorization.neurons.blocking import gates
from train.memorization.neurons.first_step import STEPS
from train.memorization.neurons.value_neurons import widths

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PROBES = 2


def sensitivity(
    pipe: StableDiffusionPipeline, clean: Sequence[str], layers: Mapping[str, nn.Module], *, batch_size: int = 32
) -> NDArray[np.float32]:
    """``s_n`` of every neuron: ``[units of all layers]``, in the noise prediction's units.

    Args:
        pipe: any model with cross-attention; nothing of it is changed.
        clean: captions that are not memorized; each is looked at from noises of its own.
        layers: the value layers.
        batch_size: captions per pass.
    """
    denoiser, sizes = denoiser_of(pipe), list(widths(layers).values())
    timesteps = denoiser.schedule.steps(50)
    total = np.zeros(sum(sizes), np.float64)
    with torch.enable_grad(), denoiser.frozen():
        for start in range(0, len(clean), batch_size):
            captions = clean[start : start + batch_size]
            cond = denoiser.encode(captions).to(dtype=denoiser.dtype)
            for probe in range(PROBES):
                seeds = [start + row + probe * len(clean) for row in range(len(captions))]
                x = denoiser.noise(seeds)
                r = torch.randn(x.shape, generator=torch.Generator().manual_seed(seeds[0])).to(x.device)
                t = timesteps[STEPS[probe % len(STEPS)]]
                factors = torch.ones(len(captions), sum(sizes), device=x.device, requires_grad=True)
                with gates(layers) as gate:
                    for name, part in zip(layers, factors[:, None].split(sizes, dim=2), strict=True):
                        gate[name] = part
                    product = (denoiser.predict(x, t, cond).eps * r).sum()
                    total += torch.autograd.grad(product, factors)[0].double().square().sum(dim=0).cpu().numpy()
    return np.sqrt(total / (len(clean) * PROBES)).astype(np.float32)


def per_cost(slopes: NDArray[np.float32], sensitivity: NDArray[np.float32]) -> NDArray[np.float32]:
    """What blocking each neuron gains for what it costs: ``∂m/∂g_n / s_n``, ``[units]``.

    A neuron that costs next to nothing is taken to cost a tenth of the median, so that none leads by a division by 0.
    """
    return (slopes / np.maximum(sensitivity, 0.1 * np.median(sensitivity))).astype(np.float32)
