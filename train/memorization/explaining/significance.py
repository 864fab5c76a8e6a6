"""Explanation: which words of a prompt its memorization hangs on.

Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR 2024), §4.2: the significance
of a token is how strongly the magnitude answers to its embedding, and the words to change first are the most
significant ones.

    from train.memorization import explain, suggest
    explanation = explain(pipe, "grinning face, face smiling")[0]
    [(word.text, word.significance) for word in explanation.ranked()]
    suggest(pipe, explanation)         # the magnitude without each of the first words, and with others in their place
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from afresh.errors import UsageError, UserError
from afresh.progress import Progress
from train.denoising.predictions import to_eps
from train.denoising.stable_diffusion import FLOAT16_GAIN, encode_captions, frozen, initial_noise, latent_shape
from train.memorization.explaining.explanation import Explanation, read_tokens
from train.memorization.signals.magnitude import Form, magnitude

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def token_significance(m: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """``‖∂m/∂e_i‖₂`` of each image and token (Wen et al., §4.2).

    Args:
        m: ``[n]``, each image's magnitude, a function of its own row of ``embeds`` alone.
        embeds: ``[n, tokens, width]``, a leaf that requires gradients.

    Returns:
        ``[n, tokens]`` float32.
    """
    (gradient,) = torch.autograd.grad(m.sum(), embeds)  # rows do not mix: the sum keeps every image's own gradient
    return torch.linalg.vector_norm(gradient.float(), dim=2)


def explain(
    pipe: StableDiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    steps: int = 10,
    num_inference_steps: int = 50,
    seeds: int | Sequence[int] | NDArray[np.int64] = 4,
    guidance_scale: float = 7.5,
    form: Form = "l2",
    batch_size: int = 8,
    gradient_checkpointing: bool = False,
    bar: Progress | None = None,
) -> list[Explanation]:
    """Significance of every token: ``SS_i = (1/T) Σ_t ‖∂m_t/∂e_i‖₂`` (Wen et al., §4.2), per seed and step.

    ``e_i`` is the i-th embedding of the text encoder's output for the prompt, the conditional half; ``m_t`` is in
    ε-space and per image. The guided DDIM trajectory is followed without gradients: each step's gradient goes through
    one UNet call. Memory is that of ``batch_size`` images with gradients, and as many without.

    Args:
        pipe: any Stable Diffusion pipeline; nothing of it is changed.
        prompts: one or several.
        steps: the paper's T, from the first step (t near T) on.
        num_inference_steps: steps of the whole trajectory.
        seeds: how many (0, 1, …), or which ones; ``[prompts, seeds]`` gives each prompt its own.
        guidance_scale: classifier-free guidance scale that the trajectory follows.
        form: of the magnitude; ``"rms"`` divides magnitude and significance by the root of a latent's size.
        batch_size: prompt and seed pairs per UNet call.
        gradient_checkpointing: see :func:`train.denoising.stable_diffusion.frozen`; for large models.
        bar: told of each pair that is done.

    Raises:
        UsageError: no prompt, no seed, or ``steps`` out of range.
        UserError: a magnitude or a gradient is not finite.
    """
    from diffusers import DDIMScheduler

    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not 1 <= steps <= num_inference_steps:
        raise UsageError(f"steps is {steps}: expected 1 to num_inference_steps, which is {num_inference_steps}")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: expected at least 1")
    table = np.arange(seeds) if isinstance(seeds, int) else np.asarray(seeds, np.int64)
    table = np.broadcast_to(table, (len(prompts), table.shape[-1]))
    if table.size == 0:
        raise UsageError("nothing to explain: there must be at least one prompt and one seed")

    unet = pipe.unet
    device, dtype, shape = unet.device, unet.dtype, latent_shape(unet)
    gain = FLOAT16_GAIN if dtype == torch.float16 else 1.0
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps[:steps].tolist()
    empty, encoded = encode_captions(pipe, [""]), encode_captions(pipe, prompts)

    pairs = [(row, column) for row in range(len(prompts)) for column in range(table.shape[1])]
    magnitudes = np.empty((*table.shape, steps), np.float32)
    significance = np.empty((*table.shape, steps, encoded.shape[1]), np.float32)
    with frozen(unet, checkpointing=gradient_checkpointing):
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            x_t = torch.stack([initial_noise(shape, int(table[pair])) for pair in batch]).to(device, dtype)
            x_t = x_t * scheduler.init_noise_sigma
            embeds = encoded[[row for row, _ in batch]].float().requires_grad_()
            for step, t in enumerate(timesteps):
                options = {"return_dict": False}
                with torch.no_grad():
                    uncond = unet(x_t, t, encoder_hidden_states=empty.expand_as(embeds), **options)[0].float()
                cond = unet(x_t, t, encoder_hidden_states=embeds.to(dtype), **options)[0].float()
                alpha_bar, prediction_type = scheduler.alphas_cumprod[t], scheduler.config.prediction_type
                m = magnitude(
                    to_eps(cond, x_t.float(), alpha_bar, prediction_type),
                    to_eps(uncond, x_t.float(), alpha_bar, prediction_type),
                    form=form,
                )
                found = token_significance(m * gain, embeds) / gain
                for i, pair in enumerate(batch):
                    magnitudes[(*pair, step)] = m[i].item()
                    significance[(*pair, step)] = found[i].cpu().numpy()
                if step + 1 < steps:
                    guided = uncond + guidance_scale * (cond.detach() - uncond)
                    x_t = scheduler.step(guided, t, x_t.float(), return_dict=False)[0].to(dtype)
            if bar is not None:
                bar.update(len(batch))

    explanations = []
    for row, prompt in enumerate(prompts):
        if not (np.isfinite(magnitudes[row]).all() and np.isfinite(significance[row]).all()):
            raise UserError(f"prompt {prompt!r}: its magnitudes or gradients are not finite; try dtype float32")
        tokens = read_tokens(pipe, prompt)
        at = np.array(timesteps, np.int64)
        explanations.append(Explanation(prompt, tokens, significance[row], magnitudes[row], table[row].copy(), at))
    return explanations

