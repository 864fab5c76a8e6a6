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

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from afresh.errors import UsageError, UserError
from afresh.progress import Progress
from train.denoising.conditioning import Conditioning
from train.denoising.families.registry import denoiser_of
from train.denoising.protocol import Denoiser
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


def gradients_along(
    denoiser: Denoiser,
    cond: Conditioning,
    seeds: Sequence[int],
    timesteps: Sequence[int],
    guidance_scale: float,
    form: Form,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """At each step of a guided DDIM trajectory the magnitudes ``m_t [n]`` and ``‖∂m_t/∂e_i‖₂ [n, tokens]``.

    Args:
        denoiser: with its weights frozen.
        cond: of the n images.
        seeds: n, of the initial noises.
        timesteps: of the steps.
        guidance_scale, form: see :func:`explain`.
    """
    x_t, empty = denoiser.noise(seeds), denoiser.encode([""]).expand(len(seeds))
    embeds = cond.embeds.float().requires_grad_()
    for step, t in enumerate(timesteps):
        with torch.no_grad():
            uncond = denoiser.predict(x_t, t, empty)
        prompted = denoiser.predict(x_t, t, cond.with_embeds(embeds.to(cond.embeds.dtype)))
        m = magnitude(prompted.compared, uncond.compared, form=form)
        yield m.detach(), token_significance(m * denoiser.gain, embeds) / denoiser.gain
        if step + 1 < len(timesteps):
            with torch.no_grad():
                guided = denoiser.guided(prompted, uncond, guidance_scale)
                x_t = denoiser.schedule.step(guided, timesteps[step + 1]).to(denoiser.dtype)


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
        gradient_checkpointing: see :func:`train.denoising.network.frozen`; for large models.
        bar: told of each pair that is done.

    Raises:
        UsageError: no prompt, no seed, or ``steps`` out of range.
        UserError: a magnitude or a gradient is not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not 1 <= steps <= num_inference_steps:
        raise UsageError(f"steps is {steps}: expected 1 to num_inference_steps, which is {num_inference_steps}")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: expected at least 1")
    table = np.arange(seeds) if isinstance(seeds, int) else np.asarray(seeds, np.int64)
    table = np.broadcast_to(table, (len(prompts), table.shape[-1]))
    if table.size == 0:
        raise UsageError("nothing to explain: there must be at least one prompt and one seed")

    denoiser = denoiser_of(pipe)
    timesteps = denoiser.schedule.steps(num_inference_steps)[:steps]
    encoded = denoiser.encode(prompts)
    pairs = [(row, column) for row in range(len(prompts)) for column in range(table.shape[1])]
    magnitudes = np.empty((*table.shape, steps), np.float32)
    significance = np.empty((*table.shape, steps, encoded.tokens), np.float32)
    with denoiser.frozen(checkpointing=gradient_checkpointing):
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            cond = encoded[[row for row, _ in batch]]
            numbers = [int(table[pair]) for pair in batch]
            follow = gradients_along(denoiser, cond, numbers, timesteps, guidance_scale, form)
            for step, (m, found) in enumerate(follow):
                if bar is not None:
                    bar.set_postfix_str(f"step {step + 1} of {steps}")
                for i, pair in enumerate(batch):
                    magnitudes[(*pair, step)] = m[i].item()
                    significance[(*pair, step)] = found[i].cpu().numpy()
            if bar is not None:
                bar.set_postfix_str("")
                bar.update(len(batch))

    explanations = []
    for row, prompt in enumerate(prompts):
        if not (np.isfinite(magnitudes[row]).all() and np.isfinite(significance[row]).all()):
            raise UserError(f"prompt {prompt!r}: its magnitudes or gradients are not finite; try dtype float32")
        tokens = read_tokens(pipe, prompt, denoiser.sequence, denoiser.frame)
        at = np.array(timesteps, np.int64)
        explanations.append(Explanation(prompt, tokens, significance[row], magnitudes[row], table[row].copy(), at))
    return explanations

