"""Prompt embeddings that are computed once, of every distinct caption, where the text encoder is not trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from afresh.files import digest
from train.denoising.conditioning import SEQUENCE, Conditioning
from train.finetune.caches.parts import Part, Write, in_memory, on_disk, weights_digest
from train.finetune.data.scan import ShardSet, captions_by_shard
from train.finetune.data.together import together
from train.finetune.data.transfer import to_device
from train.finetune.model.trained import Model
from train.stopping import StopOnSignal

if TYPE_CHECKING:
    from accelerate import Accelerator


FORMAT = 1
TOGETHER = 32  # captions encoded in one pass


def cache_texts(
    model: Model,
    shard_set: ShardSet,
    where: bool | Literal["memory", "disk"],
    folder: Path,
    accelerator: Accelerator,
    stop: StopOnSignal | None = None,
) -> CachedTexts | None:
    """The embeddings of all captions by the model's text encoder, if they are to be cached."""
    if not where:
        return None

    packing = Packing(model.denoiser.encode([""]))
    identity: list[Any] = []
    for name, encoder in model.denoiser.encoders.items():
        tokenizer = getattr(model.pipe, name.replace("text_encoder", "tokenizer"))
        vocabulary = [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length]
        identity += [weights_digest(encoder), vocabulary]
    if (chunks := getattr(model.denoiser, "chunks", 1)) > 1:
        identity.append(chunks)
    place: Literal["memory", "disk"] = "disk" if where == "disk" else "memory"

    def encode(captions: Sequence[str]) -> torch.Tensor:
        return packing.pack(model.denoiser.encode(captions))

    return CachedTexts(shard_set, encode, digest(identity), place, folder, accelerator, stop, packing.unpack)


class Packing:
    """Conditionings of one kind as one tensor each: a sequence as it is, several parts as one row of numbers.

    Args:
        like: one of the kind.
    """

    def __init__(self, like: Conditioning) -> None:
        self.shapes = {name: tuple(part.shape[1:]) for name, part in like.parts.items()}

    def pack(self, conditioning: Conditioning) -> torch.Tensor:
        """``[n, tokens, width]`` of prompt embeddings alone, else ``[n, numbers]``."""
        parts = list(conditioning.parts.values())
        return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], 1)

    def unpack(self, packed: torch.Tensor) -> Conditioning:
        """The inverse."""
        if len(self.shapes) == 1:
            return Conditioning(dict.fromkeys(self.shapes, packed))
        parts = packed.split([math.prod(shape) for shape in self.shapes.values()], 1)
        named = zip(self.shapes.items(), parts, strict=True)
        return Conditioning({name: part.unflatten(1, shape) for (name, shape), part in named})


class CachedTexts:
    """The embeddings of all captions of a run, in half precision, in memory or on disk.

    The empty caption, which every step needs for the filter and for dropped captions, is kept in full precision on the
    device.

    Args:
        shard_set: whose captions.
        encode: captions → embeddings ``[n, tokens, width]``, on the device.
        identity: digest of the text encoder and the tokenizer.
        where: ``memory``, or ``disk``.
        folder: of the files on disk.
        accelerator: the processes that share the work.
        stop: what the work is given up by.
        unpack: what ``encode`` gives → conditioning; by default it is prompt embeddings.

    Attributes:
        empty: the embedding ``[1, tokens, width]`` of the empty caption.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        encode: Callable[[Sequence[str]], torch.Tensor],
        identity: str,
        where: Literal["memory", "disk"],
        folder: Path,
        accelerator: Accelerator,
        stop: StopOnSignal | None = None,
        unpack: Callable[[torch.Tensor], Conditioning] = lambda embeds: Conditioning({SEQUENCE: embeds}),
    ) -> None:
        self._encode, self._unpack = encode, unpack
        with torch.no_grad():
            self.empty = encode([""]).float()
        self._numbers: dict[str, tuple[int, int]] = {}  # caption → part, row in it
        self._texts: list[list[str]] = []
        for part, captions in enumerate(captions_by_shard(shard_set)):
            new = [text for text in dict.fromkeys(captions) if text and text not in self._numbers]
            self._numbers.update({text: (part, row) for row, text in enumerate(new)})
            self._texts.append(new)
        self._shape = tuple(self.empty.shape[1:])
        size = int(np.prod(self._shape))
        parts = [
            Part(digest([FORMAT, identity, texts]), size * np.arange(len(texts) + 1, dtype=np.int64))
            for texts in self._texts
        ]
        about: dict[str, Any] = {"name": "cache_text", "unit": "captions", "stop": stop}
        if where == "disk":
            self.stored = together(accelerator, lambda: on_disk(folder, parts, self._encode_part, **about), stop)
        else:
            self.stored = in_memory(parts, self._encode_part, accelerator, **about)
        self._texts.clear()

    def embed(self, captions: Sequence[str]) -> torch.Tensor:
        """Embeddings ``[n, tokens, width]`` float32 of captions of the run, or empty ones, on the device.

        Raises:
            UserError: a file is damaged.
        """
        rows = torch.empty(len(captions), *self._shape)
        for at, text in enumerate(captions):
            if text:
                part, row = self._numbers[text]
                rows[at] = torch.from_numpy(self.stored[part].row(row)).view(self._shape)
        without = torch.tensor([not text for text in captions])
        rows, without = (to_device(x, self.empty.device) for x in (rows, without))
        return torch.where(without.view(-1, *[1] * len(self._shape)), self.empty, rows)

    def conditioning(self, captions: Sequence[str]) -> Conditioning:
        """:meth:`embed` as the denoiser takes it."""
        return self._unpack(self.embed(captions))

    @torch.no_grad()
    def _encode_part(self, part: int, rows: Sequence[int], write: Write) -> None:
        texts = self._texts[part]
        wanted = list(rows)
        for start in range(0, len(wanted), TOGETHER):
            some = wanted[start : start + TOGETHER]
            for row, values in zip(some, self._encode([texts[row] for row in some]).half().cpu().numpy(), strict=True):
                write(row, values)

