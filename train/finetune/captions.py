"""Which caption a sample is trained on at a visit, and its token ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.components import tokenize
from train.finetune.model import Model


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
    """The captions of all samples, tokenized once.

    Args:
        model: whose tokenizer is used.
        captions: of each row, at least one.
        dropout: probability of training on the empty caption.
    """

    def __init__(self, model: Model, captions: Sequence[tuple[str, ...]], dropout: float) -> None:
        self.captions, self.dropout = captions, dropout
        self._empty = model.empty_ids
        self._ids = tokenize(model.pipe, [text for texts in captions for text in texts])
        self._first = torch.tensor([0, *[len(texts) for texts in captions]]).cumsum(0)

    def choose(self, rows: Tensor, uniform: Tensor) -> tuple[Tensor, list[str], Tensor]:
        """Each row's chosen caption.

        Args:
            rows: ``[n]`` int64, on the CPU.
            uniform: ``[n, 2]``, see :func:`choose_caption`.

        Returns:
            token ids ``[n, tokens]``; the ``n`` texts; and whether they are conditional, ``[n]`` bool on the CPU.
        """
        ids, texts, conditional = [], [], []
        for row, numbers in zip(rows.tolist(), uniform, strict=True):
            of_row = self.captions[row]
            text, is_conditional = choose_caption(of_row, numbers, self.dropout)
            texts.append(text)
            conditional.append(is_conditional)
            ids.append(self._ids[self._first[row] + of_row.index(text)] if is_conditional else self._empty[0].cpu())
        return torch.stack(ids).to(self._empty.device), texts, torch.tensor(conditional)
