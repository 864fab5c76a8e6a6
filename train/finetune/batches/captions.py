"""Which caption a sample is trained on at a visit, and its token ids or embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from train.denoising.conditioning import Conditioning
from train.finetune.caches.texts import CachedTexts
from train.finetune.model.trained import Model

REMEMBERED = 1 << 16  # captions whose token ids are kept


def choose_caption(captions: tuple[str, ...], uniform: Tensor, dropout: float) -> tuple[str, bool]:
    """One of a sample's captions, or the empty one; and whether the sample is conditional.

    Args:
        captions: at least one.
        uniform: ``[2]`` numbers in [0, 1), for the choice and for the dropout.
        dropout: probability of the empty caption.
    """
    if uniform[1] < dropout:
        return "", False
    text = captions[min(int(uniform[0] * len(captions)), len(captions) - 1)]
    return text, bool(text)


class Captions:
    """The captions of all samples, as what the denoiser takes.

    Args:
        model: whose tokenizer is used.
        captions: those of a row, at least one.
        dropout: probability of training on the empty caption.
        cached: embeddings of all captions; without them token ids are given.
    """

    def __init__(
        self,
        model: Model,
        captions: Callable[[int], tuple[str, ...]],
        dropout: float,
        cached: CachedTexts | None = None,
    ) -> None:
        self.captions, self.dropout, self.cached = captions, dropout, cached
        self._device = model.device
        self._tokens = lru_cache(REMEMBERED)(lambda text: model.denoiser.tokens([text]))

    def choose(self, rows: Tensor, uniform: Tensor) -> tuple[Conditioning, list[str], Tensor]:
        """Each row's chosen caption.

        Args:
            rows: ``[n]`` int64, on the CPU.
            uniform: ``[n, 2]``, see :func:`choose_caption`.

        Returns:
            The captions' tokens, or their embeddings in float32; the ``n`` texts; and whether they are conditional,
            ``[n]`` bool on the CPU.
        """
        chosen = [
            choose_caption(self.captions(row), numbers, self.dropout)
            for row, numbers in zip(rows.tolist(), uniform, strict=True)
        ]
        texts = [text for text, _ in chosen]
        conditional = torch.tensor([is_conditional for _, is_conditional in chosen])
        if self.cached is not None:
            return Conditioning({"embeds": self.cached.embed(texts)}), texts, conditional
        return Conditioning.join([self._tokens(text) for text in texts]).to(self._device), texts, conditional

