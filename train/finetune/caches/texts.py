"""Prompt embeddings that are computed once, of every distinct caption, where the text encoder is not trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from afresh.files import digest
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

    def encode(captions: Sequence[str]) -> torch.Tensor:
        return model.denoiser.encode(captions).embeds

    vocabulary = [sorted(model.pipe.tokenizer.get_vocab().items()), model.pipe.tokenizer.model_max_length]
    identity = digest([weights_digest(model.denoiser.text_encoder), vocabulary])
    place: Literal["memory", "disk"] = "disk" if where == "disk" else "memory"
    return CachedTexts(shard_set, encode, identity, place, folder, accelerator, stop)


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
    ) -> None:
        self._encode = encode
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
        return torch.where(without[:, None, None], self.empty, rows)

    @torch.no_grad()
    def _encode_part(self, part: int, rows: Sequence[int], write: Write) -> None:
        texts = self._texts[part]
        wanted = list(rows)
        for start in range(0, len(wanted), TOGETHER):
            some = wanted[start : start + TOGETHER]
            for row, values in zip(some, self._encode([texts[row] for row in some]).half().cpu().numpy(), strict=True):
                write(row, values)

