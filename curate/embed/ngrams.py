"""``ngrams``: a weight-free descriptor of captions, the same letters in the same order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from curate.embed.protocol import Floats
from curate.reading.captions import normalise_caption


class NgramEmbedder:
    """Weight-free: :func:`embed_captions`, hashed character n-grams."""

    name = digest = "ngrams"
    dim = 512

    def embed(self, captions: Sequence[str]) -> Floats:
        return embed_captions(captions, dim=self.dim)


def embed_captions(captions: Sequence[str], dim: int = 512, block: int = 2048) -> Floats:
    """Hashed character n-grams (n = 2, 3, 4) of the normalised captions, weight-free.

    Each n-gram adds ±1 to one of ``dim`` places, both chosen by its hash (Weinberger et al. 2009, arXiv
    0902.2206), so the inner product estimates the cosine of n-gram counts without bias.

    Args:
        captions: any strings; the empty one has a vector of its own.
        dim: length of the vectors.
        block: captions worked on at a time, which bounds memory.

    Returns:
        float32 ``[n, dim]``, unit rows; the same caption gives the same row whatever stands beside it.
    """
    result = np.empty((len(captions), dim), np.float32)
    for start in range(0, len(captions), block):
        # The marks at both ends make n-grams of beginnings and ends, and one of the empty caption.
        texts = [f"\x02{normalise_caption(caption)}\x03" for caption in captions[start : start + block]]
        lengths = np.array([len(text) for text in texts])
        # surrogatepass: a lone surrogate in a caption is ugly but no reason to stop
        codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
        row = np.repeat(np.arange(len(texts)), lengths)
        last = np.repeat(np.cumsum(lengths), lengths)
        hashed, counts = np.zeros(len(codes), np.uint64), np.zeros(len(texts) * dim, np.float32)
        for n in range(1, 5):
            # Rolling polynomial: of the n characters from each place on.
            hashed = hashed[: len(codes) - n + 1] * np.uint64(0x100000001B3) + codes[n - 1 :]
            if n == 1:
                continue
            whole = np.arange(len(hashed)) + n <= last[: len(hashed)]
            mixed = _mixed(hashed[whole] + np.uint64(n))
            place = row[: len(hashed)][whole] * dim + (mixed % np.uint64(dim)).astype(np.int64)
            sign = np.where(mixed >> np.uint64(63), 1.0, -1.0)
            counts += np.bincount(place, sign, minlength=len(counts)).astype(np.float32)
        vectors = counts.reshape(-1, dim)
        norm = np.sqrt((vectors**2).sum(1, keepdims=True))
        # All n-grams of a very short caption may cancel; then its hash alone places it.
        for i in np.flatnonzero(norm[:, 0] == 0):
            vectors[i, int(_mixed(codes[row == i].sum(keepdims=True))[0]) % dim] = 1.0
            norm[i] = 1.0
        result[start : start + len(texts)] = vectors / norm
    return result


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

