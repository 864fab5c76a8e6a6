"""What a denoiser is conditioned on: joined, sliced, padded, moved and expanded as one, whatever a family needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

SEQUENCE, MASK, GAIN = "embeds", "mask", "gain"


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of n images: named tensors whose first dimension is n.

    The name ``embeds`` is a sequence, ``[n, tokens, width]``. Where sequences of different lengths come together, the
    shorter ones are padded and ``mask [n, tokens]`` (bool) says which tokens count: the denoiser then attends to no
    others, so that padding changes no image. ``gain [n, tokens]`` is a factor on each token's attention logits, 1 where
    it is absent. All other names are a family's own: token ids that are not encoded yet (``ids``), pooled embeddings,
    class labels (``labels``), the embeddings of an image prompt.
    """

    parts: Mapping[str, Tensor]

    @classmethod
    def of(cls, **parts: Tensor | None) -> Conditioning:
        """Of named tensors; those that are None are left out."""
        return cls({name: part for name, part in parts.items() if part is not None})

    @classmethod
    def join(cls, some: Sequence[Conditioning]) -> Conditioning:
        """Several one after the other, padded to the longest.

        Raises:
            ValueError: they have other parts.
        """
        length = max(one.tokens for one in some)
        padded = [one.padded(length) for one in some]
        for name in (MASK, GAIN):
            if any(name in one.parts for one in padded):
                padded = [one._with(name) for one in padded]
        names = padded[0].parts.keys()
        if any(one.parts.keys() != names for one in padded):
            raise ValueError(f"conditionings of {' and '.join(sorted(map(str, {tuple(one.parts) for one in padded})))}")
        return cls({name: torch.cat([one.parts[name] for one in padded]) for name in names})

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, rows: Any) -> Conditioning:
        """Some images: a slice, or an index tensor."""
        return Conditioning({name: part[rows] for name, part in self.parts.items()})

    @property
    def embeds(self) -> Tensor:
        """``[n, tokens, width]``.

        Raises:
            ValueError: it is none of prompt embeddings.
        """
        if SEQUENCE not in self.parts:
            raise ValueError(f"a conditioning of {', '.join(self.parts)} has no prompt embeddings")
        return self.parts[SEQUENCE]

    @property
    def tokens(self) -> int:
        """Length of the sequence; 0 where there is none."""
        return self.parts[SEQUENCE].shape[1] if SEQUENCE in self.parts else 0

    def with_embeds(self, embeds: Tensor) -> Conditioning:
        """The same with other prompt embeddings of the same shape."""
        return Conditioning({**self.parts, SEQUENCE: embeds})

    def padded(self, tokens: int) -> Conditioning:
        """With sequences of at least ``tokens`` tokens, of which the mask says what counts."""
        if self.tokens >= tokens or not self.tokens:
            return self
        added = tokens - self.tokens
        parts = {**self._with(MASK).parts, SEQUENCE: pad(self.embeds, (0, 0, 0, added))}
        parts |= {name: pad(parts[name], (0, added), value=name == GAIN) for name in (MASK, GAIN) if name in parts}
        return Conditioning(parts)

    def _with(self, name: str) -> Conditioning:
        """With a mask or a gain, even if it changes nothing."""
        if name in self.parts or not self.tokens:
            return self
        dtype = torch.bool if name == MASK else self.embeds.dtype
        return Conditioning({**self.parts, name: torch.ones_like(self.embeds[..., 0], dtype=dtype)})

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Conditioning:
        """On another device; ``dtype`` is that of what floats."""
        return Conditioning(
            {
                name: part.to(device=device, dtype=dtype if part.is_floating_point() else None)
                for name, part in self.parts.items()
            }
        )

    def expand(self, n: int) -> Conditioning:
        """One image's conditioning for n images, without copying it; n images' as it is.

        Raises:
            ValueError: it has neither one nor n.
        """
        if len(self) not in (1, n):
            raise ValueError(f"a conditioning of {len(self)} images is none of {n}")
        return Conditioning({name: part.expand(n, *part.shape[1:]) for name, part in self.parts.items()})

    def clone(self) -> Conditioning:
        """A copy of all tensors, as autograd wants of those that were made in inference mode."""
        return Conditioning({name: part.clone() for name, part in self.parts.items()})

    def beside(self, other: Conditioning) -> Conditioning:
        """With those parts of ``other``, of as many images, that this one does not speak of: an image prompt, say."""
        text = (SEQUENCE, MASK, GAIN)
        return Conditioning({**{name: part for name, part in other.parts.items() if name not in text}, **self.parts})

    def put(self, rows: Tensor, other: Conditioning) -> Conditioning:
        """With what ``other``, of k images, says of the images ``rows [k]``; what it does not speak of stays."""
        mine, theirs = self.padded(other.tokens), other.padded(self.tokens)
        for name in (MASK, GAIN):
            if name in mine.parts or name in theirs.parts:
                mine, theirs = mine._with(name), theirs._with(name)
        parts = dict(mine.parts)
        for name, part in theirs.parts.items():
            parts[name] = parts[name].index_put((rows,), part.to(parts[name]))
        return Conditioning(parts)

    def same_text(self, other: Conditioning) -> Tensor:
        """``[n]`` bool: which images have the same text (or label) in both, to the bit: embeddings, mask and gain."""
        names = [SEQUENCE] if SEQUENCE in self.parts else [next(iter(self.parts))]
        names += [name for name in (MASK, GAIN) if name in self.parts or name in other.parts]
        same = torch.ones(len(self), dtype=torch.bool, device=self.parts[names[0]].device)
        for name in names:
            mine, theirs = self._with(name).parts[name], other._with(name).parts[name]
            same &= (mine == theirs).reshape(len(self), -1).all(1) if mine.shape == theirs.shape else False
        return same
