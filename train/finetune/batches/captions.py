"""Which caption a sample is trained on at a visit, its random words, and its token ids or embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from train.denoising.conditioning import Conditioning
from train.finetune.caches.texts import CachedTexts
from train.finetune.config import RandomWords, Tags
from train.finetune.data.order import generator
from train.finetune.data.transfer import to_device
from train.finetune.model.trained import Model
from train.sampling.config import TokensConfig
from train.sampling.terms.random_tokens import with_random_words

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


def with_tags(text: str, tags: Tags, g: torch.Generator) -> str:
    """A caption as one visit has it; the empty one stays empty.

    Args:
        text: tags between separators, or any text where only a trigger is set.
        tags: what is changed.
        g: of the visit.
    """
    if not text:
        return text
    if tags.shuffle or tags.dropout:
        listed = [tag.strip() for tag in text.split(tags.separator) if tag.strip()]
        first, rest = listed[: tags.keep], listed[tags.keep :]
        dropped, place = torch.rand(2, len(rest), generator=g)  # both, so that neither option changes the other's
        order = place.argsort().tolist() if tags.shuffle else range(len(rest))
        left = [rest[i] for i in order if dropped[i] >= tags.dropout]
        text = f"{tags.separator} ".join([*first, *left] or listed[:1])
    return f"{tags.trigger}{tags.separator} {text}" if tags.trigger else text


class Captions:
    """The captions of all samples, as what the denoiser takes.

    Args:
        model: whose tokenizer is used.
        captions: those of a row, at least one.
        dropout: probability of training on the empty caption.
        cached: embeddings of all captions; without them token ids are given.
        tags: what is changed of captions at each visit, drawn likewise.
        words: random words that captions get at each visit, drawn by ``seed`` and the visit's position.
        seed: of the run.
    """

    def __init__(
        self,
        model: Model,
        captions: Callable[[int], tuple[str, ...]],
        dropout: float,
        cached: CachedTexts | None = None,
        words: RandomWords | None = None,
        seed: int = 0,
        tags: Tags | None = None,
    ) -> None:
        self.captions, self.dropout, self.cached = captions, dropout, cached
        self.words, self.tags, self.seed = words or RandomWords(), tags or Tags(), seed
        self._device, self._tokenizer = model.device, model.pipe.tokenizer
        self._tokens = lru_cache(REMEMBERED)(lambda text: model.denoiser.tokens([text]))

    def choose(self, rows: Tensor, uniform: Tensor, positions: Sequence[int]) -> tuple[Conditioning, list[str], Tensor]:
        """Each row's chosen caption.

        Args:
            rows: ``[n]`` int64, on the CPU.
            uniform: ``[n, 2]``, see :func:`choose_caption`.
            positions: of the visits.

        Returns:
            The captions' tokens, or their embeddings in float32; the ``n`` texts as they stand in the set; and whether
            they are conditional, ``[n]`` bool on the CPU.
        """
        chosen = [
            choose_caption(self.captions(row), numbers, self.dropout)
            for row, numbers in zip(rows.tolist(), uniform, strict=True)
        ]
        texts = [text for text, _ in chosen]
        conditional = torch.tensor([is_conditional for _, is_conditional in chosen])
        if self.cached is not None:
            return self.cached.conditioning(texts), texts, conditional
        seen = texts
        if self.tags.active:
            some = zip(texts, positions, strict=True)
            seen = [with_tags(text, self.tags, generator(self.seed, "tags", position)) for text, position in some]
        if self.words.number:
            seen = [self._with_words(text, position) for text, position in zip(seen, positions, strict=True)]
        tokens = Conditioning.join([self._tokens(text) for text in seen])
        moved = {name: to_device(part, self._device) for name, part in tokens.parts.items()}
        return Conditioning(moved), texts, conditional

    def _with_words(self, text: str, position: int) -> str:
        """``text`` with random words, in ``words.share`` of the visits; the empty caption stays empty."""
        g = generator(self.seed, "words", position)
        if not text or torch.rand((), generator=g) >= self.words.share:
            return text
        return with_random_words(text, TokensConfig(self.words.kind, self.words.number), self._tokenizer, g)

