"""What the trainer sees at each position of its stream: a pure function of (seed, position).

A *position* counts samples over the whole run and all processes. Its epoch, its sample, its caption, its augmentation,
its noise and its timestep follow from the seed and the position alone, never from elapsed state; so a run that is cut
and resumed, or spread over more processes, sees the same things.

Order: in each epoch shards are permuted and taken in windows of ``shuffle_shards``; the samples of a window are
permuted among themselves. One window's encoded bytes are held in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from curate.console import UserError, get_logger, progress
from curate.idlist import listed_keys, refuse_missing
from curate.images import ImageError, decode_image, image_array
from curate.shards import Sample, expand_shards, read_samples, shard_names
from train.finetune.augment import augment, draw
from train.finetune.config import Augmentation, FinetuneConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL

log = get_logger(__name__)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def batch_positions(step: int, micro: int, rank: int, world: int, config: FinetuneConfig) -> range:
    """Positions of the samples that a process takes in one forward pass."""
    start = ((step * config.gradient_accumulation + micro) * world + rank) * config.batch_size
    return range(start, start + config.batch_size)


def upcoming_positions(start: int, rank: int, world: int, config: FinetuneConfig) -> list[range]:
    """Positions of every batch that a process takes, from the optimizer step ``start`` to the end of the run."""
    return [
        batch_positions(step, micro, rank, world, config)
        for step in range(start, config.steps)
        for micro in range(config.gradient_accumulation)
    ]


def sample_captions(sample: Sample) -> tuple[str, ...]:
    """The sample's caption and those that curation pooled from its dropped copies; ``("",)`` if it has none."""
    captions = [sample.caption] if sample.caption else []
    if "json" in sample.members:
        try:
            pooled = json.loads(sample.members["json"]).get("afresh", {}).get("captions", [])
        except (ValueError, AttributeError):
            pooled = []
        captions += [text for text in pooled if isinstance(text, str) and text not in captions]
    return tuple(captions) or ("",)


class ShardOrder:
    """Which sample stands at which position.

    Args:
        counts: samples of each shard.
        window: shards that are shuffled together.
        seed: of the order.
    """

    def __init__(self, counts: Sequence[int], window: int, seed: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])
        self.size = int(self.offsets[-1])
        self.window = max(1, window)
        self.seed = seed
        self._epoch: tuple[int, np.ndarray] | None = None

    def permutation(self, epoch: int) -> np.ndarray:
        """All rows of one epoch in order, ``[size]`` int64; a row counts samples in the order of the shards."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = np.random.default_rng(derive_seed(self.seed, "shards", epoch)).permutation(len(self.counts))
            rows = []
            for start in range(0, len(shards), self.window):
                chosen = shards[start : start + self.window]
                window = np.concatenate([np.arange(self.offsets[s], self.offsets[s + 1]) for s in chosen])
                rng = np.random.default_rng(derive_seed(self.seed, "samples", epoch, start))
                rows.append(rng.permutation(window))
            self._epoch = epoch, np.concatenate(rows)
        return self._epoch[1]

    def row(self, position: int) -> tuple[int, int]:
        """``(row, epoch)`` at a position."""
        epoch, index = divmod(position, self.size)
        return int(self.permutation(epoch)[index]), epoch

    def locate(self, row: int) -> tuple[int, int]:
        """``(shard, place within the shard)`` of a row."""
        shard = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return shard, row - int(self.offsets[shard])


@dataclass(frozen=True)
class ShardSet:
    """The shards of a run and the identity of every sample.

    Attributes:
        shards: paths or URLs.
        counts: readable samples of each.
        ids: ``(shard, key)`` of each row.
        captions: of each row, at least one.
        excluded: keys in each shard that are no rows.
    """

    shards: list[str]
    counts: list[int]
    ids: list[tuple[str, str]]
    captions: list[tuple[str, ...]]
    excluded: list[set[str]]


def scan(patterns: Sequence[str], exclude: str = "") -> ShardSet:
    """Read every shard once for its keys and captions.

    Args:
        patterns: paths, globs, brace ranges, folders or URLs.
        exclude: a list of samples to leave out (:mod:`curate.idlist`); empty for none.

    Raises:
        UsageError: the list cannot be read, or is not of these shards.
        UserError: there is no usable sample, or a listed one is not there.
    """
    shards = expand_shards(list(patterns))
    names = shard_names(shards)
    listed = listed_keys(exclude, shards) if exclude else [set() for _ in shards]
    found: list[set[str]] = [set() for _ in shards]
    counts: list[int] = []
    ids: list[tuple[str, str]] = []
    captions: list[tuple[str, ...]] = []
    for number, shard in enumerate(progress(shards, desc="scan", unit="shard")):
        before = len(ids)
        for sample in usable_samples(shard):
            if sample.key in listed[number]:
                found[number].add(sample.key)
                continue
            ids.append((names[number], sample.key))
            captions.append(sample_captions(sample))
        counts.append(len(ids) - before)
    if exclude:
        refuse_missing(exclude, names, listed, found)
    if not ids:
        raise UserError(f"{', '.join(patterns)}: the shards hold no sample with an image that is not excluded")
    return ShardSet(shards, counts, ids, captions, listed)


def usable_samples(shard: str) -> Iterator[Sample]:
    """The samples of a shard that have an image; what else stands there is passed over with a warning."""
    for sample in read_samples(shard):
        if isinstance(sample, Sample):
            if sample.image_ext is not None:
                yield sample
        else:
            log.warning("%s: %s: %s (left out)", sample.shard, sample.key, sample.reason)


def load_image(sample: Sample, size: int) -> torch.Tensor | None:
    """Pixels ``[3, size, size]`` in [0, 1]; None, with a warning, if the image cannot be read."""
    try:
        return torch.from_numpy(image_array(decode_image(sample.image), size))
    except ImageError as error:
        log.warning("%s: %s: %s (weight 0)", sample.shard, sample.key, error)
        return None


def augmentation_generator(seed: int, row: int, epoch: int, how: Augmentation) -> torch.Generator:
    """The random numbers of one augmented form: one a visit, or one of ``how.variants``."""
    return generator(seed, "augment", row, epoch % how.variants if how.variants else epoch)


class Positions(Dataset):
    """Decoded samples by position: ``{row, pixels, readable}``; for a :class:`DataLoader` with workers."""

    def __init__(self, shard_set: ShardSet, order: ShardOrder, size: int, seed: int, how: Augmentation) -> None:
        self.shard_set, self.order, self.size, self.seed, self.how = shard_set, order, size, seed, how
        self._open: dict[int, list[Sample]] = {}

    def sample(self, row: int) -> Sample:
        """The sample of a row; its shard is read whole, and a window of shards is kept."""
        shard, place = self.order.locate(row)
        if shard not in self._open:
            while len(self._open) >= self.order.window:
                self._open.pop(next(iter(self._open)))
            samples, excluded = usable_samples(self.shard_set.shards[shard]), self.shard_set.excluded[shard]
            self._open[shard] = [sample for sample in samples if sample.key not in excluded]
        return self._open[shard][place]

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        row, epoch = self.order.row(position)
        pixels = load_image(self.sample(row), self.size)
        readable = pixels is not None
        if pixels is None:
            pixels = torch.ones(3, self.size, self.size)
        elif self.how.active:
            uniform = draw([augmentation_generator(self.seed, row, epoch, self.how)])
            pixels = augment(pixels[None], uniform, self.how)[0]
        return {"row": torch.tensor(row), "pixels": pixels, "readable": torch.tensor(readable)}


@dataclass(frozen=True)
class Batch:
    """What one forward pass trains on; tensors but ``rows`` are on the device.

    Attributes:
        positions: of the samples in the run; their random numbers follow from them.
        rows: ``[n]`` int64, which sample of the shard set each is.
        moments: ``[n, 2c, h, w]`` float32, mean and log-variance of the VAE's posterior.
        weight: ``[n]`` float32, what each counts in the loss before the filter; 0 where the image cannot be read.
    """

    positions: Sequence[int]
    rows: torch.Tensor
    moments: torch.Tensor
    weight: torch.Tensor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, ``(c, h, w)``."""
        return self.moments.shape[1] // 2, *self.moments.shape[2:]


class Batches(Protocol):
    """The batches of one process, in the order of positions."""

    def next(self) -> Batch:
        """The next one."""
        ...


def make_batches(
    dataset: Positions,
    positions: Sequence[Sequence[int]],
    config: FinetuneConfig,
    vae: AutoencoderKL,
    accelerator: Accelerator,
) -> Batches:
    """Batches at some positions, from cached latents or from the shards, as the settings ask for."""
    if config.cache_latents:
        return CachedLatents(dataset, vae, accelerator).batches(positions)
    return StreamedBatches(dataset, positions, config.workers, vae, accelerator.device)


class StreamedBatches:
    """Batches whose images are read and decoded by worker processes, in the order of positions.

    Args:
        dataset: decoded samples by position.
        positions: of every batch this process takes, from where the run stands to its end.
        workers: worker processes; 0 reads in this one.
        vae: encodes the images.
        device: where it does so.
    """

    def __init__(
        self,
        dataset: Positions,
        positions: Sequence[Sequence[int]],
        workers: int,
        vae: AutoencoderKL,
        device: torch.device,
    ) -> None:
        self.vae, self.device = vae, device
        self._positions = iter(positions)
        loader = DataLoader(
            dataset,
            batch_sampler=[list(some) for some in positions],
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            multiprocessing_context="spawn" if workers else None,
        )
        self._batches = iter(loader)

    def next(self) -> Batch:
        """The next batch; waits for the workers where they are behind."""
        batch = next(self._batches)
        return Batch(
            positions=next(self._positions),
            rows=batch["row"],
            moments=encode_moments(self.vae, batch["pixels"].to(self.device)),
            weight=batch["readable"].float().to(self.device),
        )


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance of the latents' posterior, ``[n, 8, h, w]`` float32, for pixels in [0, 1]."""
    return vae.encode((pixels * 2 - 1).to(vae.dtype)).latent_dist.parameters.float()


class CachedLatents:
    """The posterior of every sample, and of each augmented form, encoded once and held in memory.

    Each process encodes its share; the shares are then exchanged.
    """

    LIMIT = 8 << 30
    TOGETHER = 8  # images encoded in one pass: on a CPU, larger batches leave its caches

    def __init__(self, dataset: Positions, vae: AutoencoderKL, accelerator: Accelerator) -> None:
        self.order, self.how, self.device = dataset.order, dataset.how, accelerator.device
        self.variants = max(1, dataset.how.variants) if dataset.how.active else 1
        if dataset.how.active and not dataset.how.variants:
            raise UserError("cache_latents with random augmentation needs augmentation.variants > 0")
        side = dataset.size // 2 ** (len(vae.config.block_out_channels) - 1)
        channels = 2 * vae.config.latent_channels
        rows = dataset.order.size
        if rows * self.variants * channels * side**2 * 2 > self.LIMIT:
            raise UserError(
                f"cache_latents: {rows} samples × {self.variants} variants exceed {self.LIMIT >> 30} GB: "
                "lower augmentation.variants or set cache_latents to false"
            )
        self.moments = torch.zeros(rows, self.variants, channels, side, side, dtype=torch.float16)
        self.readable = torch.zeros(rows, dtype=torch.bool)
        mine = range(accelerator.process_index, rows, accelerator.num_processes)
        together = max(1, self.TOGETHER // self.variants)
        with progress(total=len(mine), desc="encode latents", unit="image") as bar:
            for start in range(0, len(mine), together):
                some = mine[start : start + together]
                self._encode(dataset, some, vae)
                bar.update(len(some))
        if accelerator.num_processes > 1:  # every row was filled by one process: the sum is the whole
            device = accelerator.device
            self.moments = accelerator.reduce(self.moments.to(device), reduction="sum").cpu()
            self.readable = accelerator.reduce(self.readable.to(device).int(), reduction="sum").cpu().bool()

    def _encode(self, dataset: Positions, rows: Sequence[int], vae: AutoencoderKL) -> None:
        """Fill in the posteriors of some rows, all their variants in one pass."""
        images = [load_image(dataset.sample(row), dataset.size) for row in rows]
        readable = [(row, image) for row, image in zip(rows, images, strict=True) if image is not None]
        if not readable:
            return
        numbers = [row for row, _ in readable]
        pixels = torch.stack([image for _, image in readable]).repeat_interleave(self.variants, dim=0)
        if self.how.active:
            generators = [
                augmentation_generator(dataset.seed, row, variant, self.how)
                for row in numbers
                for variant in range(self.variants)
            ]
            pixels = augment(pixels, draw(generators), self.how)
        moments = encode_moments(vae, pixels.to(self.device)).half().cpu()
        self.moments[numbers] = moments.view(len(numbers), self.variants, *moments.shape[1:])
        self.readable[numbers] = True

    def batches(self, positions: Sequence[Sequence[int]]) -> CachedBatches:
        """Batches at the given positions."""
        return CachedBatches(self, positions, self.device)


class CachedBatches:
    """Batches from :class:`CachedLatents`."""

    def __init__(self, cache: CachedLatents, positions: Sequence[Sequence[int]], device: torch.device) -> None:
        self.cache, self.device = cache, device
        self._positions = iter(positions)

    def next(self) -> Batch:
        """The next batch."""
        positions = next(self._positions)
        rows, variants = [], []
        for position in positions:
            row, epoch = self.cache.order.row(position)
            rows.append(row)
            variants.append(epoch % self.cache.variants)
        return Batch(
            positions=positions,
            rows=torch.tensor(rows),
            moments=self.cache.moments[rows, variants].float().to(self.device),
            weight=self.cache.readable[rows].float().to(self.device),
        )
