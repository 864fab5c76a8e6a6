"""Cross-attention entropy: how evenly the latents attend to the tokens of the prompt.

Source: Ren et al., "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention"
(ECCV 2024): while a prompt that is not memorized comes to attend to the first token almost alone towards the end of the
trajectory, a memorized one keeps attending to others, so its entropy stays high.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from train.memorization.signals.protocol import LooksAt, Seen


class AttentionEntropy:
    """``Σ_i −ā_i ln ā_i`` over all tokens i, padding included, averaged over the cross-attention layers and the steps.

    ``ā_i`` is a layer's attention to token i, averaged over heads and latents.
    """

    name = "attention_entropy"
    looks_at: ClassVar[LooksAt] = "every step"
    noise_level: ClassVar[float | None] = None
    attention = True
    unconditional = compares_seeds = False

    def observe(self, seen: Seen) -> Tensor:
        """``[n]``, in nats: from 0 to ln tokens."""
        return torch.stack([entropy(layer) for layer in seen.attention.values()]).mean(dim=0)

    def combine(self, observed: Tensor) -> Tensor:
        """``[seeds, steps]`` → ``[seeds]``."""
        return observed.mean(dim=1)

    def of_prompt(self, values: Tensor) -> Tensor:
        """The mean."""
        return values.mean()


def entropy(shares: Tensor) -> Tensor:
    """``Σ −p ln p`` over the last dimension, with 0 ln 0 = 0."""
    return torch.special.entr(shares).sum(dim=-1)

