"""Which sample stands at which position of the trainer's stream: a pure function of (seed, position).

A *position* counts samples over the whole run and all processes. Its sample, and the number of times that this sample
was visited before, follow from the seed and the position alone, never from elapsed state: a run that is cut and
resumed, read by any number of workers, or spread over more processes sees the same things.

One stream: in each epoch shards are permuted and taken in windows; the samples of a window are permuted among
themselves. A shard with ``repeats`` stands in the permutation that many times.

With buckets (images of several shapes, of which a batch holds one) every bucket has a stream of its own: the samples
of the bucket in the order above, one epoch behind the other, cut into batches. So the last batch of an epoch is filled
up with the first samples of the next; every sample is visited equally often, and none is lost. Batches of different
buckets follow one another in the order in which their last samples stand in the order above. With one bucket this is
the plain order.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass(frozen=True)
class _Epoch:
    """Where the shards of an epoch stand.

    Attributes:
        slots: the shards in order, one that is repeated several times.
        copies: how many times each stood before in the epoch.
        starts: ``[windows + 1, buckets]``, samples of each bucket before each window.
        batches: ``[windows + 1]``, batches that are full before each window, counted from the epoch's start.
    """

    slots: Ints
    copies: Ints
    starts: Ints
    batches: Ints


@dataclass(frozen=True)
class _Window:
    """The samples of a window in their order: rows, visits and buckets ``[n]``, and what is in each bucket."""

    rows: Ints
    visits: Ints
    bucket: Ints
    members: list[Ints]  # places in the window, in order


class SampleOrder:
    """Which sample stands at which position.

    A *row* counts the samples in the order of the shards; a *visit* counts how often a row was seen before, over all
    epochs. Only the windows that are asked for are laid out, so memory does not grow with the number of samples.

    Args:
        counts: samples of each shard.
        window: shards that are shuffled together.
        seed: of the order.
        repeats: how often the samples of each shard stand in an epoch; once by default.
        batch_size: samples of a batch, which are of one bucket. Without buckets the order does not depend on it.
        buckets: number of buckets.
        bucket_of: gives the bucket of each sample of a shard, ``[counts[shard]]`` integers below ``buckets``; it is
            pickled along with the order.
    """

    def __init__(
        self,
        counts: Sequence[int] | Ints,
        window: int,
        seed: int,
        *,
        repeats: Sequence[int] | None = None,
        batch_size: int = 1,
        buckets: int = 1,
        bucket_of: Callable[[int], NDArray[Any]] | None = None,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])
        self.rows = int(self.offsets[-1])
        self.repeats = np.ones_like(self.counts) if repeats is None else np.asarray(repeats, dtype=np.int64)
        self.window, self.seed, self.batch_size = max(1, window), seed, batch_size
        self.bucket_of = bucket_of
        if bucket_of is None:
            self.bucket_counts = self.counts[:, None]  # [shards, buckets]
        else:
            self.bucket_counts = np.stack(
                [np.bincount(bucket_of(shard), minlength=buckets) for shard in range(len(self.counts))]
            )
        self.per_epoch = self.repeats @ self.bucket_counts  # visits in each bucket, [buckets]
        self.size = int(self.per_epoch.sum())
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        self._last_batch = (-1, 0, 0)

    def at(self, position: int) -> tuple[int, int]:
        """``(row, visit)`` at a position."""
        return self._sample(*self._stream(position))

    def bucket(self, position: int) -> int:
        """The bucket of the sample at a position: one for all positions of a batch."""
        return self._stream(position)[0]

    def locate(self, row: int) -> tuple[int, int]:
        """``(shard, place within the shard)`` of a row."""
        shard = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return shard, row - int(self.offsets[shard])

    def substitutes(self, position: int, at_most: int = 256) -> Iterator[tuple[int, int]]:
        """``(row, visit)`` of samples that can stand in for the one at a position, each row once.

        They are of the same bucket: first those of the same window, so that no other shard must be read, then some from
        anywhere in the epoch. Their order is drawn anew for each position, so that where a whole shard is gone, no
        single sample stands in for all of its samples.
        """
        bucket, index = self._stream(position)
        epoch, place = divmod(index, int(self.per_epoch[bucket]))
        window = self._window_of(epoch, bucket, place)
        members = self._window(epoch, window).members[bucket]
        rng = np.random.default_rng(derive_seed(self.seed, "substitute", position))
        near = int(self._epoch(epoch).starts[window, bucket]) + rng.permutation(len(members))[:at_most]
        far = rng.integers(int(self.per_epoch[bucket]), size=at_most)
        seen = {self._sample(bucket, index)[0]}
        for other in [*near.tolist(), *far.tolist()]:
            row, visit = self._sample(bucket, epoch * int(self.per_epoch[bucket]) + other)
            if row not in seen:
                seen.add(row)
                yield row, visit

    # ------------------------------------------------------------------------------------------- buckets

    def _stream(self, position: int) -> tuple[int, int]:
        """The bucket at a position, and the place in the bucket's endless stream."""
        if len(self.per_epoch) == 1:
            return 0, position
        batch, slot = divmod(position, self.batch_size)
        if self._last_batch[0] != batch:
            self._last_batch = (batch, *self._batch(batch))
        _, bucket, first = self._last_batch
        return bucket, first + slot

    def _batch(self, batch: int) -> tuple[int, int]:
        """The bucket of a batch, and the place of its first sample in the bucket's stream."""
        epoch = batch * self.batch_size // self.size  # the right one, or one before it
        while self._batches_before(epoch + 1) <= batch:
            epoch += 1
        layout = self._epoch(epoch)
        batch -= self._batches_before(epoch)
        number = int(np.searchsorted(layout.batches, batch, side="right")) - 1
        batch -= int(layout.batches[number])
        window = self._window(epoch, number)
        last = epoch * self.per_epoch + layout.starts[number]  # place in its stream of each bucket's next sample
        place = np.empty(len(window.rows), dtype=np.int64)
        for bucket, members in enumerate(window.members):
            place[members] = last[bucket] + np.arange(len(members))
        full = np.flatnonzero((place + 1) % self.batch_size == 0)[batch]
        return int(window.bucket[full]), int(place[full]) + 1 - self.batch_size

    def _batches_before(self, epoch: int) -> int:
        return int((epoch * self.per_epoch // self.batch_size).sum())

    # ------------------------------------------------------------------------------------ epochs, windows

    def _sample(self, bucket: int, index: int) -> tuple[int, int]:
        """``(row, visit)`` at a place of a bucket's stream."""
        epoch, place = divmod(index, int(self.per_epoch[bucket]))
        number = self._window_of(epoch, bucket, place)
        window = self._window(epoch, number)
        at = window.members[bucket][place - int(self._epoch(epoch).starts[number, bucket])]
        return int(window.rows[at]), int(window.visits[at])

    def _window_of(self, epoch: int, bucket: int, place: int) -> int:
        return int(np.searchsorted(self._epoch(epoch).starts[:, bucket], place, side="right")) - 1

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            slots = np.repeat(np.arange(len(self.counts)), self.repeats)
            first = np.repeat(np.cumsum(self.repeats) - self.repeats, self.repeats)
            copies = np.arange(len(slots)) - first
            order = np.random.default_rng(derive_seed(self.seed, "shards", epoch)).permutation(len(slots))
            slots, copies = slots[order], copies[order]
            of_slot = self.bucket_counts[slots]
            of_window = np.add.reduceat(of_slot, np.arange(0, len(slots), self.window), axis=0)
            starts = np.concatenate([np.zeros_like(of_window[:1]), np.cumsum(of_window, axis=0)])
            before = epoch * self.per_epoch
            batches = ((before + starts) // self.batch_size - before // self.batch_size).sum(axis=1)
            _remember(self._epochs, epoch, _Epoch(slots, copies, starts, batches), at_most=4)
        return self._epochs[epoch]

    def _window(self, epoch: int, number: int) -> _Window:
        if (epoch, number) not in self._windows:
            layout = self._epoch(epoch)
            start = number * self.window
            chosen = slice(start, start + self.window)
            slots = list(zip(layout.slots[chosen].tolist(), layout.copies[chosen].tolist(), strict=True))
            rows = np.concatenate([np.arange(self.offsets[s], self.offsets[s + 1]) for s, _ in slots])
            visits = np.concatenate([np.full(self.counts[s], epoch * self.repeats[s] + copy) for s, copy in slots])
            if self.bucket_of is None:
                bucket = np.zeros_like(rows)
            else:
                bucket = np.concatenate([self.bucket_of(s).astype(np.int64) for s, _ in slots])
            order = np.random.default_rng(derive_seed(self.seed, "samples", epoch, start)).permutation(len(rows))
            bucket = bucket[order]
            members = np.split(
                np.argsort(bucket, kind="stable"),
                np.cumsum(np.bincount(bucket, minlength=len(self.per_epoch)))[:-1],
            )
            window = _Window(rows[order], visits[order], bucket, members)
            _remember(self._windows, (epoch, number), window, at_most=8)
        else:
            self._windows.move_to_end((epoch, number))
        return self._windows[epoch, number]

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be computed again."""
        return vars(self) | {"_epochs": OrderedDict(), "_windows": OrderedDict()}


def _remember(kept: OrderedDict[Any, Any], key: Any, value: Any, at_most: int) -> None:
    kept[key] = value
    while len(kept) > at_most:
        kept.popitem(last=False)

