"""Attention masking: the denoiser does not attend to what summarises the prompt, and more to what says nothing.

Source: Ren et al., "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention"
(ECCV 2024, arXiv 2403.11052). A memorized prompt keeps the attention on a few tokens: words that trigger it, and the
summary tokens behind the prompt (end and padding), which have read all of it. With ``s_i = q·k_i/√d`` the logits of
the prompt's tokens, of which 0 is the beginning and 1 … N are its words and the end, cross-attention under it is

    softmax(C s_0, s_1, …, s_N, −∞, …, −∞)

at every step: what follows the end is masked, and the beginning token's logit is multiplied by ``C``.

``C = 1.25`` and the first end token, which stays, are the released command line's; ``mask_end`` masks that too. The
released code lays the mask over the pass without the prompt as well, where the tokens are those of another text; here
it is the prompt's alone.
"""

from __future__ import annotations

from typing import Any

import torch

from train.denoising.conditioning import GAIN, MASK, Conditioning
from train.sampling.config import AttentionConfig, configured
from train.sampling.guidance import Change, Run, Start, StepFunction


class AttentionMasking:
    """A term that works before the first step only, and on every image; see the module. It costs no pass.

    The trace of the first step gets ``attended``: how many tokens are left.

    Args:
        config: settings.
        overrides: fields of :class:`AttentionConfig` to set otherwise.
    """

    name = "attention"

    def __init__(self, config: AttentionConfig | None = None, **overrides: Any) -> None:
        self.config = configured(AttentionConfig, config, overrides)

    def start(self, run: Run) -> StepFunction:
        """Nothing happens after the first step."""
        return lambda state: None

    def prepare(self, start: Start) -> Change | None:
        """The prompts' conditioning with a mask and a gain.

        Raises:
            ValueError: the prompts are not known as text.
        """
        if start.prompts is None or start.run.tokenizer is None or start.cond is None:
            raise ValueError("attention masking needs prompts as text, not as embeddings")
        embeds, tokenizer = start.cond.embeds, start.run.tokenizer
        tokens = embeds.shape[1]
        # With the beginning and the end; a prompt that is cut ends with its last token.
        lengths = [min(len(tokenizer(text).input_ids), tokens) - self.config.mask_end for text in start.prompts]
        mask = torch.arange(tokens, device=embeds.device) < torch.tensor(lengths, device=embeds.device).unsqueeze(1)
        gain = torch.ones_like(embeds[..., 0])
        gain[:, 0] = self.config.beginning
        rows = torch.arange(len(embeds), device=embeds.device)
        cond = Conditioning({**start.cond.parts, MASK: mask, GAIN: gain})
        return Change(rows, cond=cond, columns={"attended": lengths})
