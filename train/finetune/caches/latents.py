"""Latents that are encoded once: of every image, and of each of its augmented forms, the posterior of the VAE."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from afresh.cores import in_order
from afresh.errors import UserError
from afresh.files import digest
from afresh.progress import get_logger
from train.finetune.caches.parts import Part, Write, in_memory, on_disk, weights_digest
from train.finetune.config import Augmentation
from train.finetune.data.images import ImageLoader, SampleError
from train.finetune.data.together import together
from train.stopping import StopOnSignal

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL


log = get_logger(__name__)
FORMAT = 1
TOGETHER = 8  # images encoded in one pass: on a CPU, larger batches leave its caches
BYTES_AHEAD = 1 << 26  # of encoded images that are decoded or wait for the VAE


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance of the latents' posterior, ``[n, 8, h, w]`` float32, on the VAE's device.

    Args:
        vae: the autoencoder.
        pixels: ``[n, 3, H, W]`` uint8, on any device. A fourth channel is a mask: its mean over what becomes a latent
            pixel, in [0, 1], comes behind the moments.
    """
    pixels = pixels.to(vae.device)
    moments = vae.encode(pixels[:, :3].to(vae.dtype) / 255 * 2 - 1).latent_dist.parameters.float()
    if pixels.shape[1] == 3:
        return moments
    mask = F.adaptive_avg_pool2d(pixels[:, 3:].float() / 255, moments.shape[-2:])
    return torch.cat([moments, mask], dim=1)


class CachedLatents:
    """The moments of every image and variant, in memory or on disk.

    Args:
        loader: images by row.
        vae: what encodes them.
        where: ``memory``, or ``disk``.
        folder: of the files on disk.
        accelerator: the processes that share the work.
        threads: that decode images meanwhile.
        stop: what the work is given up by.

    Raises:
        UserError: images differ at every visit (``augmentation.variants`` is 0), or there is no room.
    """

    def __init__(
        self,
        loader: ImageLoader,
        vae: AutoencoderKL,
        where: Literal["memory", "disk"],
        folder: Path,
        accelerator: Accelerator,
        threads: int = 1,
        stop: StopOnSignal | None = None,
    ) -> None:
        if loader.varies and not loader.how.variants:
            raise UserError("cache_latents with random crops or augmentation needs augmentation.variants > 0")
        self.loader, self.vae, self.threads = loader, vae, threads
        self.shard_set = loader.shard_set
        self.variants = loader.how.variants if loader.varies else 1
        self.channels = 2 * vae.config.latent_channels + loader.masked
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.buckets = lru_cache(maxsize=256)(loader.buckets)
        parts = self._parts(weights_digest(vae) if where == "disk" else "")
        about: dict[str, Any] = {"name": "cache_latents", "unit": "images", "stop": stop}
        if where == "disk":
            self.stored = together(accelerator, lambda: on_disk(folder, parts, self._encode_part, **about), stop)
        else:
            self.stored = in_memory(parts, self._encode_part, accelerator, **about)

    def load(self, row: int, visit: int) -> NDArray[np.float16]:
        """The moments ``[8, h, w]`` of a row at a visit.

        Raises:
            SampleError: its image could not be encoded, or the file is damaged there.
        """
        shard, place = self.shard_set.locate(row)
        try:
            values = self.stored[shard].row(place)
        except UserError as error:
            raise SampleError(str(error)) from error
        if values is None:
            raise SampleError("its image could not be read when latents were cached")
        return values.reshape(self.variants, *self.shape(row))[visit % self.variants]

    def shape(self, row: int) -> tuple[int, int, int]:
        """Of the moments of a row: channels, height, width."""
        shard, place = self.shard_set.locate(row)
        width, height = self.loader.sizes[self.buckets(shard)[place]]
        return self.channels, height // self.factor, width // self.factor

    def _parts(self, vae: str) -> list[Part]:
        loader, shard_set = self.loader, self.shard_set
        area = np.array([w // self.factor * (h // self.factor) for w, h in loader.sizes])
        looks: list[Any] = [loader.crop, loader.sizes, *(["masked"] if loader.masked else [])]
        if loader.varies:
            looks += [_ranges(loader.how), loader.seed]
        parts = []
        for shard, name in enumerate(shard_set.names):
            sizes = self.variants * self.channels * area[loader.buckets(shard)]
            images = hashlib.sha256()  # what they are and not where: a copied shard has the same latents
            for column in ("crc32", "bytes"):
                images.update(shard_set.column(shard, column).tobytes())
            identities = [name, shard_set.shard(shard).column("key").to_pylist()] if loader.varies else None
            key = digest([FORMAT, vae, images.hexdigest(), looks, identities])
            parts.append(Part(key, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)))
        return parts

    def _encode_part(self, shard: int, places: Sequence[int], write: Write) -> None:
        """Encode images of one shard, those of a bucket together, while others are decoded."""
        first = int(self.shard_set.counts[:shard].sum())
        bucket = self.buckets(shard)[list(places)]
        rows = first + np.asarray(places)[np.argsort(bucket, kind="stable")]
        waiting: list[tuple[int, NDArray[np.uint8]]] = []

        def flush() -> None:
            if waiting:
                pixels = torch.from_numpy(np.concatenate([images for _, images in waiting]))
                moments = encode_moments(self.vae, pixels).half().cpu().numpy()
                for (row, _), values in zip(waiting, np.split(moments, len(waiting)), strict=True):
                    write(row - first, values)
                waiting.clear()

        data = self._read(rows)
        for row, images in in_order(
            self._decode, data, self.threads, at_most=64, weigh=lambda item: len(item[1]), weight=BYTES_AHEAD
        ):
            if images is None:
                continue
            if waiting and images.shape[1:] != waiting[0][1].shape[1:]:
                flush()
            waiting.append((row, images))
            if len(waiting) * self.variants >= TOGETHER:
                flush()
        flush()

    def _read(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
        for row in rows.tolist():
            try:
                yield row, self.loader.reader.read(row)
            except SampleError as error:
                name = "/".join(self.shard_set.identity(row))
                raise UserError(f"{name}: {error}; latents cannot be cached without it") from error

    def _decode(self, item: tuple[int, bytes]) -> tuple[int, NDArray[np.uint8] | None]:
        row, data = item
        try:
            return row, np.stack([self.loader.decode(row, variant, data) for variant in range(self.variants)])
        except SampleError as error:
            log.warning("%s: %s (left out)", "/".join(self.shard_set.identity(row)), error)
            return row, None


def _ranges(how: Augmentation) -> list[float]:
    return [how.shift, how.scale, how.flip, how.colour, how.hue, how.rotate, how.variants]

