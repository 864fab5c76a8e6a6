"""An embedder's cosines on one scale: calibration on a set's own nearest neighbours that are no copies.

Who is a copy is told apart first: rows of one group, rows at least as near as curation's threshold; and where a set was
not curated, rows nearer than the law of its other nearest neighbours allows (:func:`without_twins`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate.neighbors.brute_force import nearest

_CALIBRATION_SAMPLE = 4096  # kept samples whose nearest neighbours calibrate
_CALIBRATION_ELEMENTS = 1 << 21  # float32 similarities of theirs that are held at a time: 8 MB
_ROUNDING = 1e-3  # what float16 rows may add to a cosine
_TWINS = 1e-4  # the share of rows that are by chance as near to another as a twin


@dataclass(frozen=True)
class Calibration:
    """A monotone piecewise-linear map of an embedder's cosine onto the scale of SSCD.

    Published thresholds (AMG's above all) speak of SSCD's cosine, where a set's images that are no copies
    find their nearest neighbour near 0.1 and a copy lies above 0.5. Other embedders crowd their cosines
    elsewhere.

    Attributes:
        cosine: increasing anchors, from -1 to 1.
        value: what they map to, increasing, from -1 to 1.
    """

    cosine: tuple[float, ...] = (-1.0, 0.0, 1.0)
    value: tuple[float, ...] = (-1.0, 0.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.cosine) != len(self.value) or len(self.cosine) < 2:
            raise ValueError("a calibration has two or more anchors, each a cosine and a value")
        if (np.diff(self.cosine) <= 0).any() or (np.diff(self.value) <= 0).any():
            raise ValueError("a calibration's anchors must increase")

    @classmethod
    def fit(cls, nn_similarities: NDArray | Sequence[float]) -> Calibration:
        """Calibrate on the nearest-neighbour cosines of images known not to be copies of one another.

        Their least becomes 0, their median 0.1, their 99 % quantile 0.5, and a cosine of 1 stays 1. With
        fewer than two there is nothing to go by, and the map is the identity.
        """
        cosines = np.asarray(nn_similarities, np.float64)
        cosines = cosines[np.isfinite(cosines)]
        if len(cosines) < 2:
            return cls()
        anchors = [float(cosines.min()), *(float(q) for q in np.quantile(cosines, (0.5, 0.99)))]
        # Strictly increasing and inside (-1, 1), even if all cosines are one number.
        gap = 1e-3
        anchors = [min(max(a, -1 + gap * (i + 1)), 1 - gap * (3 - i)) for i, a in enumerate(anchors)]
        for i in (1, 2):
            anchors[i] = max(anchors[i], anchors[i - 1] + gap)
        return cls(cosine=(-1.0, *(round(a, 6) for a in anchors), 1.0), value=(-1.0, 0.0, 0.1, 0.5, 1.0))

    def __call__(self, cosine: Any) -> Any:
        """Arrays and numbers → numpy; torch tensors → torch, differentiable."""
        x: Any
        y: Any
        if type(cosine).__module__.partition(".")[0] == "torch":
            import torch

            kind = {"dtype": cosine.dtype, "device": cosine.device}
            x, y = torch.tensor(self.cosine, **kind), torch.tensor(self.value, **kind)
            k = torch.bucketize(cosine.detach(), x[1:-1])
        else:
            cosine = np.asarray(cosine)
            x, y = np.array(self.cosine), np.array(self.value)
            k = np.searchsorted(x[1:-1], cosine)
        slope = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
        return y[k] + (cosine - x[k]) * slope[k]

    def inverse(self) -> Calibration:
        """The map back: which cosine a value on SSCD's scale stands for."""
        return Calibration(cosine=self.value, value=self.cosine)


def nearest_distinct(
    embeddings: NDArray, kept: NDArray[np.bool_], group: NDArray[np.int64], threshold: float | None = None
) -> NDArray[np.float32]:
    """Cosine of kept rows with their nearest kept row of another group.

    Args:
        embeddings: ``[n, d]``.
        kept: bool ``[n]``.
        group: int64 ``[n]``.
        threshold: the cosine from which two rows are copies, whatever their groups; None has no such.

    Returns:
        float32, one for each kept row (of evenly spaced ones, where there are more than 4096) that has such a row.
    """
    rows = np.flatnonzero(kept)
    asked = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _CALIBRATION_SAMPLE)).astype(int))]
    of_asked = group[asked]

    def unit(some: NDArray[np.int64]) -> NDArray[np.float32]:
        x = np.asarray(embeddings[some], np.float32)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    queries = unit(asked) if len(asked) else np.empty((0, embeddings.shape[1]), np.float32)
    step = max(1, _CALIBRATION_ELEMENTS // max(embeddings.shape[1], len(asked), 1))

    def hide(start: int, similarity: NDArray[np.float32]) -> None:
        some = group[rows[start : start + step]]
        own = np.flatnonzero(np.isin(some, of_asked))  # few: most groups have no row that is asked for
        similarity[:, own] = np.where(of_asked[:, None] == some[own], -np.inf, similarity[:, own])
        if threshold is not None:
            similarity[similarity > threshold + _ROUNDING] = -np.inf

    blocks = ((start, unit(rows[start : start + step])) for start in range(0, len(rows), step))
    cosine, _ = nearest(queries, blocks, hide=hide)
    return cosine[np.isfinite(cosine)]


def without_twins(cosines: NDArray[np.floating]) -> NDArray[np.float64]:
    """The nearest-neighbour cosines of a set less those of twins: copies, and what the embedder takes for copies.

    The distance to the nearest of many rows that know nothing of each other follows Weibull's law (a law of least
    values), whatever the embedder: its shape says how many dimensions the rows fill, its scale how densely. Both follow
    from the nearest tenth and the nearer half of the rows, and a few twins hardly move these. What is so near that the
    law expects it of one row in 10,000 (``_TWINS``) is left out.

    Args:
        cosines: ``[n]``; of twins, less than a tenth.
    """
    finite: NDArray[np.float64] = np.asarray(cosines, np.float64)[np.isfinite(cosines)]
    if len(finite) < 2:
        return finite
    distances = np.log(np.maximum(1 - finite, 1e-6))
    nearest, middle = np.quantile(distances, (0.1, 0.5))
    # Log distances are linear in these, by the law.
    tenth, half, twins = np.log(-np.log1p(-np.array([0.1, 0.5, _TWINS])))
    return finite[distances >= nearest - (middle - nearest) * (tenth - twins) / (half - tenth) - 1e-9]
