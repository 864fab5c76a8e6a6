"""Prompt-embedding minimisation: change the prompt's embeddings until the prompt no longer decides the image.

Source: Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR 2024, arXiv
2407.21720), section 4.2: at the first timestep, minimise ``m(e) = ‖ε(x_T, e) − ε(x_T, e_∅)‖₂`` by AdamW from ``e =
e_p``, over the embeddings of all tokens but the first (BOS), until ``m ≤ l_target``.

The released code takes the norm over the whole batch; here each image has its own loss and stops on its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.memorization.signals.magnitude import magnitude
from train.sampling.config import PromptConfig, configured, number
from train.sampling.guidance import Change, Run, Start, StepFunction
from train.sampling.terms.descent import descend


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
        c = self.config
        if start.uncond is None or start.cond is None or not start.cond.tokens:
            raise ValueError("prompt minimisation needs a prompt and classifier-free guidance")
        rows = torch.arange(start.run.batch_size, device=start.x_t.device)
        found = [minimise(start, chunk, c) for chunk in rows.split(c.slice)]
        embeds, before, after, steps = (torch.cat(columns) for columns in zip(*found, strict=True))
        columns = {"prompt_magnitude": before, "prompt_magnitude_after": after, "prompt_steps": steps}
        acts = steps > 0
        return Change(rows[acts], cond=start.cond[rows[acts]].with_embeds(embeds[acts]), columns=columns)


def minimise(start: Start, rows: Tensor, c: PromptConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings of the images ``rows``, ``m`` before and after, and the number of steps taken: ``[k, …]``."""
    assert start.uncond is not None and start.cond is not None
    x_t, cond = start.x_t[rows], start.cond[rows].clone()
    eps_uncond = start.denoise(x_t, start.uncond[rows], rows)
    with torch.inference_mode(False), torch.enable_grad():
        x_t, eps_uncond = x_t.clone(), eps_uncond.clone()
        embeds = cond.embeds.float().clone()
        first, rest = embeds[:, :1], embeds[:, 1:].clone().requires_grad_()

        def m(rest: Tensor) -> Tensor:
            changed = cond.with_embeds(torch.cat([first, rest], 1).to(cond.embeds.dtype))
            return magnitude(start.denoise(x_t, changed, rows), eps_uncond, form=c.form)

        rest, before, after, steps = descend(m, rest, number("prompt.target", c.target), c.steps, c.lr)
    return torch.cat([first, rest], 1), before, after, steps

