"""Batches in the order of positions: streamed from the shards by worker processes, or gathered from cached latents."""

from __future__ import annotations

import collections
import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from afresh.errors import UserError
from afresh.progress import get_logger
from train.finetune.batches.layout import cache_folder
from train.finetune.caches.latents import CachedLatents, encode_moments
from train.finetune.config import FinetuneConfig
from train.finetune.data.images import Fault, Found, ImageLoader, SampleError, find_batch
from train.finetune.data.order import SampleOrder
from train.finetune.data.transfer import to_device
from train.stopping import StopOnSignal

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import AutoencoderKL


log = get_logger(__name__)
T = TypeVar("T")
BATCHES_AHEAD = 8  # of cached latents, gathered while a step runs


@dataclass(frozen=True)
class Batch:
    """What one forward pass trains on; ``moments`` and ``weight`` are on the device.

    Attributes:
        positions: of the samples in the run; their random numbers follow from them.
        rows: ``[n]`` int64, which sample of the shard set each is.
        moments: ``[n, 2c, h, w]`` float32, mean and log-variance of the VAE's posterior.
        mask: ``[n, 1, h, w]`` float32 in [0, 1], what each latent pixel's error counts; None where all count alike.
        frames: ``[n, 6]`` int64 on the CPU, see ``ImageLoader.frame``.
        weight: ``[n]`` float32, what each counts in the loss before the filter; 0 where no image could be read.
        faults: samples that others stand in for.
    """

    positions: Sequence[int]
    rows: torch.Tensor
    moments: torch.Tensor
    frames: torch.Tensor
    weight: torch.Tensor
    faults: Sequence[Fault] = ()
    mask: torch.Tensor | None = None

    @classmethod
    def of(cls, moments: torch.Tensor, **others: Any) -> Batch:
        """One whose mask, if there is any, is the last and odd channel of its moments."""
        if moments.shape[1] % 2 == 0:
            return cls(moments=moments, **others)
        return cls(moments=moments[:, :-1], mask=moments[:, -1:], **others)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, ``(c, h, w)``."""
        return self.moments.shape[1] // 2, *self.moments.shape[2:]


class Batches(Protocol):
    """The batches of one process, in the order of positions.

    Attributes:
        waited: seconds that were spent waiting for the next one.
    """

    waited: float

    def next(self) -> Batch:
        """The next one."""
        ...


def batch_positions(step: int, micro: int, rank: int, world: int, config: FinetuneConfig) -> range:
    """Positions of the samples that a process takes in one forward pass."""
    start = ((step * config.gradient_accumulation + micro) * world + rank) * config.batch_size
    return range(start, start + config.batch_size)


def upcoming_positions(start: int, rank: int, world: int, config: FinetuneConfig) -> Iterator[range]:
    """Positions of every batch that a process takes, from the optimizer step ``start`` to the end of the run."""
    for step in range(start, config.steps):
        for micro in range(config.gradient_accumulation):
            yield batch_positions(step, micro, rank, world, config)


def make_batches(
    loader: ImageLoader,
    order: SampleOrder,
    positions: Iterable[Sequence[int]],
    config: FinetuneConfig,
    vae: AutoencoderKL,
    accelerator: Accelerator,
    stop: StopOnSignal | None = None,
) -> Batches:
    """Batches at some positions, from cached latents or from the shards, as the settings ask for."""
    if config.cache_latents:
        where: Literal["memory", "disk"] = "disk" if config.cache_latents == "disk" else "memory"
        latents = CachedLatents(loader, vae, where, cache_folder(config), accelerator, config.workers, stop)
        return CachedBatches(latents, order, positions, accelerator.device)
    return StreamedBatches(DecodedBatches(order, loader), positions, config.workers, vae, accelerator.device)


class DecodedBatches(Dataset[Any]):
    """Decoded images by position, for a :class:`DataLoader` with workers: a whole batch is asked for at once."""

    def __init__(self, order: SampleOrder, loader: ImageLoader) -> None:
        self.order, self.loader = order, loader

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Any] | str:
        """``positions``, ``rows``, ``pixels [n, 3, h, w]`` uint8, ``weight`` and ``faults``, see :class:`Batch`.

        An exception is given back as its message, which names the sample: what the loader would make of it is a
        traceback of many lines.
        """
        try:
            found = find_batch(self.order, positions, self._load, self.loader.shard_set.identity)
        except UserError as error:
            return str(error)
        width, height = self.loader.size(found[0].row)
        nothing = np.full((3 + self.loader.masked, height, width), 255, dtype=np.uint8)
        return {**about(found, positions, self.loader), "pixels": stacked(found, nothing)}

    def _load(self, row: int, visit: int) -> NDArray[np.uint8]:
        try:
            return self.loader.load(row, visit)
        except (SampleError, UserError):
            raise
        except Exception as error:
            name = "/".join(self.loader.shard_set.identity(row))
            raise UserError(f"{name}: the sample cannot be loaded: {type(error).__name__}: {error}") from error


class StreamedBatches:
    """Batches whose images are read and decoded by worker processes.

    Args:
        dataset: decoded images by position.
        positions: those of every batch that this process takes, from where the run stands to its end; they are taken as
            far ahead as batches are prefetched.
        workers: worker processes; 0 reads in this one.
        vae: encodes the images.
        device: where it does so.
    """

    def __init__(
        self,
        dataset: DecodedBatches,
        positions: Iterable[Sequence[int]],
        workers: int,
        vae: AutoencoderKL,
        device: torch.device,
    ) -> None:
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=positions,  # type: ignore[arg-type]  # torch asks for lists, and takes any sequence
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_leave_signals_to_the_parent if workers else None,
        )
        self.vae, self.device, self.waited = vae, device, 0.0
        self._batches = iter(loader)
        if workers:  # when this object goes, at the latest before Python waits for its children at its own end
            Finalize(self, _end_workers, (self._batches,), exitpriority=100)

    def next(self) -> Batch:
        """The next batch; waits for the workers where they are behind.

        Raises:
            UserError: a worker died, no sample can be read any more, or a sample cannot be loaded.
        """
        began = time.monotonic()
        with dead_workers_named(OSError, EOFError):  # the second message of a worker that died between two of them
            decoded = next(self._batches)
        self.waited += time.monotonic() - began
        if isinstance(decoded, str):
            raise UserError(decoded)
        return Batch.of(
            positions=decoded["positions"],
            rows=decoded["rows"],
            moments=encode_moments(self.vae, to_device(decoded["pixels"], self.device)),
            frames=decoded["frames"],
            weight=to_device(decoded["weight"], self.device),
            faults=decoded["faults"],
        )


class CachedBatches:
    """Batches from :class:`CachedLatents`, gathered by a thread while the step before runs.

    Args:
        latents: the moments of all images.
        order: which sample stands at which position.
        positions: those of every batch that this process takes.
        device: where batches go.
    """

    def __init__(
        self, latents: CachedLatents, order: SampleOrder, positions: Iterable[Sequence[int]], device: torch.device
    ) -> None:
        self.latents, self.order, self.device, self.waited = latents, order, device, 0.0
        self._batches = ahead(self._gather, positions, BATCHES_AHEAD)

    def next(self) -> Batch:
        """The next batch. Raises ``UserError`` if no sample can be read any more."""
        began = time.monotonic()
        gathered = next(self._batches)
        self.waited += time.monotonic() - began
        gathered["moments"] = to_device(gathered["moments"], self.device).float()
        gathered["weight"] = to_device(gathered["weight"], self.device)
        return Batch.of(**gathered)

    def _gather(self, positions: Sequence[int]) -> dict[str, Any]:
        shard_set = self.latents.shard_set
        found = find_batch(self.order, positions, self.latents.load, shard_set.identity)
        nothing = np.zeros(self.latents.shape(found[0].row), dtype=np.float16)
        return {**about(found, positions, self.latents.loader), "moments": stacked(found, nothing)}


def about(found: Sequence[Found[Any]], positions: Sequence[int], loader: ImageLoader) -> dict[str, Any]:
    """What a batch says of its samples, see :class:`Batch`."""
    weight = [0.0 if one.value is None else loader.shard_set.weight(one.row) for one in found]
    return {
        "positions": positions,
        "rows": torch.tensor([one.row for one in found]),
        "frames": torch.tensor([loader.frame(one.row, one.visit) for one in found]),
        "weight": torch.tensor(weight),
        "faults": [fault for one in found for fault in one.faults],
    }


def stacked(found: Sequence[Found[NDArray[Any]]], nothing: NDArray[Any]) -> torch.Tensor:
    """The values of a batch ``[n, …]``, with ``nothing`` where there is none."""
    return torch.from_numpy(np.stack([nothing if one.value is None else one.value for one in found]))


@contextlib.contextmanager
def dead_workers_named(*lost: type[Exception]) -> Iterator[None]:
    """Turns torch's error about a dead data worker, which strikes anywhere in the main thread, into advice.

    Args:
        lost: other exceptions that mean the same where this stands: connections that end.
    """
    kinds: tuple[type[Exception], ...] = (RuntimeError, *lost)
    try:
        yield
    except kinds as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"a data worker died ({reason}): if memory ran out, lower workers or batch_size; if shared memory did "
            "(/dev/shm, small in containers), enlarge it; then the same command goes on from the newest checkpoint"
        ) from error


def _as_it_is(batch: T) -> T:
    return batch


def _end_workers(batches: Any) -> None:
    """Tell the workers of a loader to end, and end those that do not: SIGTERM they ignore."""
    batches._shutdown_workers()
    for worker in batches._workers:
        if worker.is_alive():
            worker.kill()


def _leave_signals_to_the_parent(_: int) -> None:
    """A batch system signals all processes of a job at once; the parent still needs its workers to stop cleanly."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def ahead(function: Callable[[Any], T], items: Iterable[Any], depth: int) -> Iterator[T]:
    """``map(function, items)`` on one thread that runs up to ``depth`` items ahead."""
    waiting: collections.deque[Future[T]] = collections.deque()
    pool = ThreadPoolExecutor(1)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

