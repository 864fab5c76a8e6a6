"""Prompt-embedding minimisation: change the prompt's embeddings until the prompt no longer decides the image.

Source: Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR 2024, arXiv
2407.21720), section 4.2: at the first timestep, minimise ``m(e) = ‖ε(x_T, e) − ε(x_T, e_∅)‖₂`` by AdamW from ``e =
e_p``, over the embeddings of all tokens but the first (BOS), until ``m ≤ l_target``.

The released code takes the norm over the whole batch; here each image has its own loss and stops on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train.denoising.conditioning import Conditioning
from train.memorization.signals.magnitude import Form, magnitude
from train.sampling.config import AnisotropyConfig, PromptConfig, configured, number
from train.sampling.descent import descend
from train.sampling.guidance import Change, Run, Start, StepFunction


class PromptMinimisation:
    """A term that works before the first step only; see the module.

    The trace of the first step gets ``prompt_magnitude`` and ``prompt_magnitude_after``, and ``prompt_steps``, how many
    steps an image took. Images at or below the target keep every bit.

    Args:
        config: settings.
        overrides: fields of :class:`PromptConfig` to set otherwise.
    """

    name = "prompt"

    def __init__(self, config: PromptConfig | None = None, **overrides: Any) -> None:
        self.config = configured(PromptConfig, config, overrides)

    def start(self, run: Run) -> StepFunction:
        """Nothing happens after the first step."""
        return lambda state: None

    def prepare(self, start: Start) -> Change | None:
        """New embeddings for the images above the target.

        Raises:
            ValueError: there is no text, or no classifier-free guidance.
        """
        found = minimised(start, self.config, "prompt", lambda rows: own_magnitude(start, rows, self.config.form))
        embeds, before, after, steps = found
        columns = {"prompt_magnitude": before, "prompt_magnitude_after": after, "prompt_steps": steps}
        return with_embeddings(start, embeds, steps, columns)


def own_magnitude(start: Start, rows: Tensor, form: Form) -> Callable[[Conditioning], Tensor]:
    """``m [k]`` of the images ``rows`` at the first timestep, as a function of their conditioning."""
    assert start.uncond is not None
    x_t = start.x_t[rows].clone()
    eps_uncond = start.denoise(x_t, start.uncond[rows].clone(), rows)
    return lambda cond: magnitude(start.denoise(x_t, cond, rows), eps_uncond, form=form)


def minimised(
    start: Start,
    c: PromptConfig | AnisotropyConfig,
    name: str,
    loss_of: Callable[[Tensor], Callable[[Conditioning], Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """AdamW on each image's own loss, over the embeddings of all tokens but the first, until it is at most the target.

    Args:
        start: what the images start from.
        c: ``target``, ``steps``, ``lr`` and ``slice``.
        name: of the setting.
        loss_of: some images ``[k]`` → their losses ``[k]`` as a function of their conditioning; it is called without
            gradients, its result with them.

    Returns:
        Embeddings ``[n, tokens, width]``, the loss before and after, and the number of steps taken ``[n]``.

    Raises:
        ValueError: there is no text, or no classifier-free guidance.
    """
    if start.uncond is None or start.cond is None or not start.cond.tokens:
        raise ValueError(f"{name} minimisation needs a prompt and classifier-free guidance")
    found = []
    for rows in torch.arange(start.run.batch_size, device=start.x_t.device).split(c.slice):
        with torch.inference_mode(False):
            cond = start.cond[rows].clone()
            with torch.no_grad():
                loss = loss_of(rows)
            embeds = cond.embeds.float().clone()
            first, rest = embeds[:, :1], embeds[:, 1:].clone().requires_grad_()

            def of_rest(rest: Tensor, loss: Any = loss, cond: Conditioning = cond, first: Tensor = first) -> Tensor:
                return loss(cond.with_embeds(torch.cat([first, rest], 1).to(cond.embeds.dtype)))

            with torch.enable_grad():
                rest, *numbers = descend(of_rest, rest, number(f"{name}.target", c.target), c.steps, c.lr)
        found.append((torch.cat([first, rest], 1), *numbers))
    embeds, before, after, steps = (torch.cat(columns) for columns in zip(*found, strict=True))
    return embeds, before, after, steps


def with_embeddings(start: Start, embeds: Tensor, steps: Tensor, columns: dict[str, Any]) -> Change:
    """New embeddings for the images that took a step; the others keep every bit."""
    assert start.cond is not None
    rows = steps.nonzero().flatten()
    return Change(rows, cond=start.cond[rows].with_embeds(embeds[rows]), columns=columns)
