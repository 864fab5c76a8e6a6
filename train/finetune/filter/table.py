"""The filter's record: of each sample how often it was seen, judged and left out, and at which magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from afresh.files import write_atomic
from train.memorization.thresholds import BANDS


class VerdictTable:
    """What the filter saw and did, by sample id; written as Parquet at the end of a run.

    Eight bytes a sample, and about a hundred for each that was judged or left out: of a hundred million samples, a run
    judges a few.

    Args:
        size: samples.
        judges: False keeps the visits alone.
    """

    def __init__(self, size: int, judges: bool = True) -> None:
        self.seen = torch.zeros(size, dtype=torch.int32)
        # Where in the following a sample stands; -1 for one that was neither judged nor left out.
        self.place = torch.full((size if judges else 0,), -1, dtype=torch.int32)
        self.used = 0
        self.reached = torch.zeros(0, dtype=torch.int32)
        self.dropped = torch.zeros(0, dtype=torch.int32)
        self.judged_by_band = torch.zeros(0, BANDS, dtype=torch.int32)
        self.magnitude_by_band = torch.zeros(0, BANDS, dtype=torch.float32)  # sums

    def grow(self, size: int) -> None:
        """Take at least ``size`` samples; those that are new stand behind the others."""
        if (more := size - len(self.seen)) > 0:
            more = max(more, len(self.seen))
            self.seen = torch.cat([self.seen, self.seen.new_zeros(more)])
            if len(self.place):
                self.place = torch.cat([self.place, self.place.new_full((more,), -1)])

    def record(self, rows: Tensor, bands: Tensor, magnitudes: Tensor, reached: Tensor, dropped: Tensor) -> None:
        """Add some visits; all arguments ``[n]`` on the CPU, magnitudes NaN where not judged."""
        self.seen.index_put_((rows,), torch.ones_like(rows, dtype=torch.int32), accumulate=True)
        judged = ~magnitudes.isnan()
        some = (judged | dropped).nonzero()[:, 0]
        if not len(some):
            return
        at = self._places(rows[some])
        self.reached.index_put_((at,), reached[some].int(), accumulate=True)
        self.dropped.index_put_((at,), dropped[some].int(), accumulate=True)
        judged = judged[some]
        cells = (at[judged], bands[some][judged])
        self.judged_by_band.index_put_(cells, torch.ones_like(cells[0], dtype=torch.int32), accumulate=True)
        self.magnitude_by_band.index_put_(cells, magnitudes[some][judged], accumulate=True)

    def _places(self, rows: Tensor) -> Tensor:
        """Where samples ``[n]`` stand: ``[n]`` int64; new ones get a place."""
        new = rows[self.place[rows] < 0].unique()
        if self.used + len(new) > len(self.reached):
            self._reserve(max(self.used + len(new), 2 * len(self.reached), 1024))
        self.place[new] = torch.arange(self.used, self.used + len(new), dtype=torch.int32)
        self.used += len(new)
        return self.place[rows].long()

    def _reserve(self, places: int) -> None:
        """Make room."""
        for name in ("reached", "dropped", "judged_by_band", "magnitude_by_band"):
            old = getattr(self, name)
            longer = old.new_zeros(places, *old.shape[1:])
            longer[: self.used] = old[: self.used]
            setattr(self, name, longer)

    def totals(self) -> dict[str, int]:
        """Counts over all samples."""
        return {
            "judged": int(self.judged_by_band.sum()),
            "dropped": int(self.dropped.sum()),
            "samples_dropped_at_least_once": int((self.dropped > 0).sum()),
        }

    def most_dropped(self, at_most: int) -> list[tuple[int, int, float | None]]:
        """``(row, visits left out, mean magnitude)`` of the samples that were left out most often, most of all first.

        The magnitude is None where a sample was left out by another one's verdict alone.
        """
        often, places = self.dropped[: self.used].topk(min(at_most, self.used))
        rows = torch.isin(self.place, places[often > 0].int()).nonzero()[:, 0]
        at = self.place[rows].long()
        judged, sums = self.judged_by_band[at].sum(dim=1), self.magnitude_by_band[at].sum(dim=1)
        means = [total / count if count else None for total, count in zip(sums.tolist(), judged.tolist(), strict=True)]
        found = zip(rows.tolist(), self.dropped[at].tolist(), means, strict=True)
        return sorted(found, key=lambda one: (-one[1], one[0]))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to store in a checkpoint."""
        names = ("reached", "dropped", "judged_by_band", "magnitude_by_band")
        return {"seen": self.seen, "place": self.place, **{name: getattr(self, name)[: self.used] for name in names}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value.clone())
        self.used = len(self.reached)

    def write(self, path: Path, ids: Sequence[tuple[str, str]]) -> None:
        """Write the table, one row a sample that was seen, in the order of the shards.

        Columns: ``shard``, ``key``; ``seen``, visits; ``judged``, those at which the filter looked at it; ``reached``,
        those of them at which it reached the threshold; ``dropped``, visits at which it was left out, by that visit's
        verdict or an earlier one; ``judged_by_band`` and the mean ``magnitude_by_band``, by timestep band (null where
        it was never judged).
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = self.seen.nonzero()[:, 0]
        n = len(rows)
        place = self.place[rows].long() if len(self.place) else torch.full((n,), -1)
        known, at = place >= 0, place[place >= 0]
        judged, sums = torch.zeros(n, BANDS, dtype=torch.int32), torch.zeros(n, BANDS)
        reached, dropped = torch.zeros(2, n, dtype=torch.int32)
        judged[known], sums[known] = self.judged_by_band[at], self.magnitude_by_band[at]
        reached[known], dropped[known] = self.reached[at], self.dropped[at]
        mean = pa.array((sums / judged).flatten().numpy(), pa.float32(), mask=(judged == 0).flatten().numpy())
        names = [ids[row] for row in rows.tolist()]
        table = pa.table(
            {
                "shard": pa.array([shard for shard, _ in names], pa.string()),
                "key": pa.array([key for _, key in names], pa.string()),
                "seen": self.seen[rows].numpy(),
                "judged": judged.sum(dim=1).int().numpy(),
                "reached": reached.numpy(),
                "dropped": dropped.numpy(),
                "judged_by_band": pa.FixedSizeListArray.from_arrays(pa.array(judged.flatten().numpy()), BANDS),
                "magnitude_by_band": pa.FixedSizeListArray.from_arrays(mean, BANDS),
            }
        )
        with write_atomic(path) as temporary:
            pq.write_table(table, temporary)

