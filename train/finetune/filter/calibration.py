"""Where the filter's threshold lies, found from the magnitudes of samples that are known to be unique.

The magnitudes of all samples grow while a model fits its set, so a threshold that fits the first steps is low for the
last ones. A window that fades follows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from afresh.errors import UserError
from curate.reading.urls import find_shards, shard_names
from train.memorization.thresholds import BANDS

ENOUGH = 20
"""Magnitudes that a band must have before it has a threshold."""


class MagnitudeQuantiles:
    """A quantile of the magnitudes in each timestep band, over a window of optimizer steps.

    A band's magnitudes are counted on a logarithmic scale, in bins 1.8 % wide, within which the quantile is
    interpolated; so the state is small, and depends on nothing but what was added, in any order within a step.

    Args:
        quantile: in (0, 1). In a band with fewer than ``1/(1 − quantile)`` magnitudes it lies by the largest of them.
        per_band: False takes all bands together and gives them one threshold.
        window: a magnitude's weight falls by a factor e in so many steps; 0 keeps all alike.
    """

    LOW, HIGH, BINS = 1e-4, 1e4, 1024

    def __init__(self, quantile: float, per_band: bool, window: int) -> None:
        self.quantile, self.per_band, self.window = quantile, per_band, window
        self.counts = torch.zeros(BANDS, self.BINS, dtype=torch.float64)

    def add(self, bands: torch.Tensor, magnitudes: torch.Tensor) -> None:
        """The magnitudes ``[n]`` of one step, in their bands ``[n]`` int64; on the CPU, none of them NaN."""
        if self.window:
            self.counts *= float(np.exp(-1 / self.window))
        bins = self._places(magnitudes).long()
        self.counts += torch.bincount(bands * self.BINS + bins, minlength=self.counts.numel()).view_as(self.counts)

    def _places(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """Where on the scale of bins magnitudes stand, in [0, BINS)."""
        scale = (magnitudes.double().clamp(self.LOW, self.HIGH) / self.LOW).log() / np.log(self.HIGH / self.LOW)
        return (scale * self.BINS).clamp(max=np.nextafter(self.BINS, 0))

    def sizes(self) -> list[float]:
        """How many magnitudes each threshold rests on, a faded one counting less."""
        sizes = self.counts.sum(dim=1)
        return (sizes if self.per_band else sizes.sum().expand(BANDS)).tolist()

    def thresholds(self) -> torch.Tensor:
        """``[BANDS]`` float32; infinite where there are fewer than ``ENOUGH`` magnitudes."""
        return self.at(torch.arange(BANDS), torch.full((BANDS,), self.quantile, dtype=torch.float64))

    def at(self, bands: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
        """The magnitudes below which these shares of their band's lie.

        Args:
            bands: ``[n]`` int64.
            quantiles: ``[n]`` float64 in [0, 1].

        Returns:
            ``[n]`` float32; infinite where the band has fewer than ``ENOUGH`` magnitudes.
        """
        counts = self._counts()[bands]
        upto = counts.cumsum(dim=1)
        rank = quantiles[:, None] * upto[:, -1:]
        bins = torch.searchsorted(upto, rank).clamp(max=self.BINS - 1)
        before = upto.gather(1, bins) - counts.gather(1, bins)
        within = (rank - before) / counts.gather(1, bins).clamp(min=1e-300)
        found = self.LOW * ((bins + within.clamp(0, 1)) * (np.log(self.HIGH / self.LOW) / self.BINS)).exp()
        return torch.where(upto[:, -1:] < ENOUGH, torch.inf, found)[:, 0].float()

    def shares_below(self, bands: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
        """Which share of their band's magnitudes these exceed, the inverse of :meth:`at`.

        Args:
            bands: ``[n]`` int64.
            magnitudes: ``[n]``.

        Returns:
            ``[n]`` float64 in [0, 1]; NaN where the band has fewer than ``ENOUGH`` magnitudes.
        """
        counts, places = self._counts()[bands], self._places(magnitudes)
        bins = places.long()[:, None]
        upto = counts.cumsum(dim=1)
        below = upto.gather(1, bins)[:, 0] - counts.gather(1, bins)[:, 0] * (1 - places.frac())
        return torch.where(upto[:, -1] < ENOUGH, torch.nan, below / upto[:, -1])

    def _counts(self) -> torch.Tensor:
        """``[BANDS, BINS]``, what each band goes by."""
        return self.counts if self.per_band else self.counts.sum(dim=0, keepdim=True).expand_as(self.counts)


def unique_samples(folder: str, urls: Sequence[str], ids: Iterable[tuple[str, str]]) -> NDArray[np.bool_]:
    """``[samples]``: which samples have no near copy, by the ledger of a curation of these very shards.

    Args:
        folder: that ``curate dedup`` wrote.
        urls: shards of the run.
        ids: ``(shard's name, key)`` of each sample.

    Raises:
        UserError: there is no ledger, or it knows none of the samples.
    """
    from curate.results.ledger import UNREADABLE, read_ledger

    ledger = read_ledger(folder, ["shard", "key", "status", "group_size"])
    columns = [ledger[name].to_pylist() for name in ("shard", "key", "status", "group_size")]
    shards = find_shards(columns[0], urls, f"{folder}/ledger.parquet")
    names = shard_names(urls)
    alone = {
        (names[shards[shard]], key)
        for shard, key, status, size in zip(*columns, strict=True)
        if shard in shards and status != UNREADABLE and size == 1
    }
    unique = np.array([one in alone for one in ids], dtype=bool)
    if not unique.any():
        raise UserError(
            f"filter.calibrate.unique: the ledger of {folder} names none of these samples as unique; it must be the "
            "curation of the shards that are trained on"
        )
    return unique

