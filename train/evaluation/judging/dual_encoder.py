"""A small image–text dual encoder: the evaluation's independent judge.

Nothing that guides or filters a model ever sees it. It gives three views of an image and one of a caption:

- ``embed_images`` and ``embed_texts``: the joint space in which an image lies near its caption (alignment);
- ``copy_features``: the space in which an image lies near edited copies of itself (copied share);
- ``image_features``: what stands before both heads (quality, by Fréchet distance).

Image tower: strided convolutions down to 8 × 8 places, pooled by learned queries' attention. Text tower:
words as bags of hashed character n-grams (Bojanowski et al., "Enriching word vectors with subword
information", 2017), so that unseen words share parts with known ones, pooled by a learned gate. Trained by
``train/sample_model/dual_encoder.py``; the weights that the project carries lie in
``train/assets/dual_encoder``.
"""

from __future__ import annotations

import json
import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from afresh.errors import UserError, reason
from afresh.files import write_atomic, write_json

if TYPE_CHECKING:
    from PIL import Image


WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class DualEncoderConfig:
    """Sizes of the two towers."""

    image_size: int = 64
    width: int = 128
    """Width of the image tower and of both heads' outputs."""
    queries: int = 8
    """Learned queries that pool the places."""
    buckets: int = 8192
    """Rows of the table that words and their character n-grams are hashed to."""
    text_width: int = 64
    dropout: float = 0.1
    """Of both towers' hidden layers, while training."""


def words(caption: str) -> list[str]:
    """The words of a caption, NFKC-normalised and case-folded, punctuation left out."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", caption).casefold())


@lru_cache(maxsize=100_000)
def word_parts(word: str, buckets: int) -> tuple[int, ...]:
    """Table rows of a word: itself first, then its character n-grams (n = 3, 4, 5) with the word's ends
    marked.
    """
    marked = f"<{word}>"
    grams = {marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)} - {marked}
    return tuple(zlib.crc32(part.encode()) % buckets for part in [marked, *sorted(grams)])


class DualEncoder(nn.Module):
    """Both towers. ``forward`` is for training; the other methods take what a user has and give numpy."""

    def __init__(self, config: DualEncoderConfig | None = None):
        super().__init__()
        self.config = config = config or DualEncoderConfig()
        d, t = config.width, config.text_width
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 4, 2, 1),
            nn.ReLU(),
            *_convolution(24, 48, stride=2),
            *_convolution(48, 80, stride=1),
            *_convolution(80, d, stride=2),
            *_convolution(d, d, stride=1),
            nn.Conv2d(d, d, 3, 1, 1),
        )
        self.position = nn.Parameter(torch.randn(1, (config.image_size // 8) ** 2, d) * 0.02)
        self.pool = AttentionPool(d, config.queries)
        self.mlp = nn.Sequential(
            nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(2 * d, d)
        )
        self.image_norm = nn.LayerNorm(d)
        self.image_head = nn.Linear(d, d)
        self.copy_head = nn.Linear(d, d)

        self.parts = nn.EmbeddingBag(config.buckets, t, mode="mean")
        nn.init.normal_(self.parts.weight, std=0.3)
        self.gate = nn.Linear(t, 1)
        self.text_hidden = nn.Sequential(
            nn.LayerNorm(t), nn.Linear(t, 2 * d), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(2 * d, d)
        )
        self.text_skip = nn.Linear(t, d, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3))  # the joint space's inverse temperature, exp(2.3) = 10

    def image_tower(self, pixels: Tensor) -> Tensor:
        """Features before the heads: ``[n, 3, size, size]`` in [0, 1] → ``[n, width]`` float32."""
        x = self.stem(pixels * 2 - 1).flatten(2).transpose(1, 2)
        x = self.pool(x, self.position)
        return self.image_norm(x + self.mlp(x)).float()

    def text_tower(self, captions: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Captions as words as table rows (:func:`word_parts`) → ``[n, width]`` float32 unit rows."""
        # A caption without a word stands as one empty word, whose vector is zero.
        captions = [caption or [()] for caption in captions]
        flat = [part for caption in captions for word in caption for part in word]
        sizes = torch.tensor([0] + [len(word) for caption in captions for word in caption])
        device = self.parts.weight.device
        vectors = self.parts(
            torch.tensor(flat, dtype=torch.long, device=device), sizes[:-1].cumsum(0).to(device)
        ).float()
        n, counts = len(captions), torch.tensor([len(caption) for caption in captions], device=device)
        row = torch.repeat_interleave(torch.arange(n, device=device), counts)
        # A learned gate says how much each word counts: "with" little, "flag" much.
        weight = torch.sigmoid(self.gate(vectors).float())
        total = torch.zeros(n, 1, device=device).index_add(0, row, weight)
        pooled = torch.zeros(n, vectors.shape[1], device=device).index_add(0, row, weight * vectors) / total
        return F.normalize((self.text_skip(pooled) + self.text_hidden(pooled)).float(), dim=-1)

    def forward(self, pixels: Tensor, captions: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor, Tensor]:
        """Unit rows ``(image, copy, text)``: joint space, copy space, joint space."""
        features = self.image_tower(pixels)
        image = F.normalize(self.image_head(features).float(), dim=-1)
        copy = F.normalize(self.copy_head(features).float(), dim=-1)
        return image, copy, self.text_tower(captions)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image], batch_size: int = 128) -> np.ndarray:
        """Features before the heads, ``[n, width]`` float32, not normalised; quality is measured on them."""
        from curate.reading.images import stack_images

        self.eval()
        device = self.position.device
        out = [np.empty((0, self.config.width), np.float32)]
        for start in range(0, len(images), batch_size):
            pixels = stack_images(images[start : start + batch_size], self.config.image_size)
            out.append(self.image_tower(torch.as_tensor(pixels).to(device)).cpu().numpy())
        return np.concatenate(out)

    @torch.no_grad()
    def joint_from_features(self, features: np.ndarray) -> np.ndarray:
        """Joint-space unit rows of ``image_features``' rows."""
        head = self.image_head(torch.as_tensor(features, device=self.position.device))
        return F.normalize(head, dim=-1).cpu().numpy()

    @torch.no_grad()
    def copy_from_features(self, features: np.ndarray) -> np.ndarray:
        """Copy-space unit rows of ``image_features``' rows."""
        head = self.copy_head(torch.as_tensor(features, device=self.position.device))
        return F.normalize(head, dim=-1).cpu().numpy()

    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 128) -> np.ndarray:
        """Joint space: ``[n, width]`` float32 unit rows; cosine with :meth:`embed_texts` is the alignment."""
        return self.joint_from_features(self.image_features(images, batch_size))

    def copy_features(self, images: Sequence[Image.Image], batch_size: int = 128) -> np.ndarray:
        """Copy space: ``[n, width]`` float32 unit rows; the cosine of two images says how far one copies the
        other.
        """
        return self.copy_from_features(self.image_features(images, batch_size))

    @torch.no_grad()
    def embed_texts(self, captions: Sequence[str]) -> np.ndarray:
        """Joint space: ``[n, width]`` float32 unit rows."""
        self.eval()
        if not len(captions):
            return np.empty((0, self.config.width), np.float32)
        parts = [[word_parts(word, self.config.buckets) for word in words(caption)] for caption in captions]
        return self.text_tower(parts).cpu().numpy()

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` (fp16) and ``config.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu()
            for name, tensor in self.state_dict().items()
        }
        with write_atomic(folder / WEIGHTS) as temporary:
            save_file(weights, temporary)
            temporary.chmod(0o644)  # safetensors makes its files private
        write_json(folder / CONFIG, asdict(self.config))

    @classmethod
    def load(cls, folder: str | Path | None = None) -> DualEncoder:
        """Load in float32, in evaluation mode; by default the one that the project carries.

        Raises:
            UserError: a file is missing or the weights do not fit the config.
        """
        folder = Path(folder) if folder is not None else Path(__file__).parents[2] / "assets" / "dual_encoder"
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: missing; a dual encoder is a folder with {WEIGHTS} and {CONFIG}")
        try:
            model = cls(DualEncoderConfig(**json.loads((folder / CONFIG).read_text())))
            model.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
        except Exception as error:
            raise UserError(f"{folder}: not a dual encoder ({reason(error)})") from error
        return model.eval()


def _convolution(width_in: int, width_out: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()


class AttentionPool(nn.Module):
    """Learned queries look over all places, ``[n, places, width]`` → ``[n, width]``, each with a slice of the
    width.

    A query scores places by what stands there and where (keys from content plus position), so the result
    knows a little of the layout without being bound to it.
    """

    def __init__(self, width: int, queries: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(width, queries) * width**-0.5)
        self.norm, self.value, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        n, places, width = x.shape
        x = self.norm(x)
        weight = ((x + position) @ self.query).softmax(dim=1)  # [n, places, queries]
        value = self.value(x).view(n, places, weight.shape[2], -1)
        return self.out((weight.unsqueeze(-1) * value).sum(dim=1).reshape(n, width))

