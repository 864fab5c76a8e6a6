"""What all visits to a sample, or to a caption, say together of whether the model has memorized it.

One visit's magnitude tells little: it depends on the noise and the timestep. A caption whose image stands in the set
forty times is met so often that its magnitudes can be taken together, before the model draws a copy of it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import torch
from torch import Tensor

FORGOTTEN = 8
"""Windows after which a key that was not met is forgotten: its visits weigh less than 1/2000 then."""


class Evidence:
    """Normal scores of magnitudes, gathered by key (a sample or a caption), older ones counting less.

    The score of a visit is ``z = Φ⁻¹(F(m))``, with F the distribution of unique samples' magnitudes in its timestep
    band: standard normal for a unique sample. A key's visits, with weights ``w_i = exp(−age_i / window)``, make

        Z = Σ w_i z_i / √(Σ w_i² + ρ ((Σ w_i)² − Σ w_i²)),

    which is standard normal for a unique sample again, however often it was visited, where ρ is the correlation between
    two visits of one unique sample: captions differ in their magnitudes also where nothing is memorized. It is
    estimated from the unique samples that were met again. With a single visit Z is that visit's z, and a verdict that
    of its magnitude alone.

    A verdict against a key holds until Z falls below a lower quantile: otherwise what is left out comes back as soon as
    its magnitude has fallen by a little, and is learned again.

    Args:
        window: optimizer steps in which a visit's weight falls by a factor e.
        quantile: of Z among unique samples, from which on a verdict is against the sample.
        release: the quantile below which it no longer is; at most ``quantile``.
    """

    LIMIT = 2.5  # of |z|: a few hundred magnitudes tell no more of their distribution's ends

    def __init__(self, window: int, quantile: float, release: float) -> None:
        self.window = window
        ends = torch.special.ndtri(torch.tensor([quantile, release], dtype=torch.float64))
        self.least, self.least_again = ends.tolist()
        # key → Σ w z, Σ w, Σ w², all at the step that stands last
        self.of: dict[int, tuple[float, float, float, int]] = {}
        self.met_again = np.zeros(2)  # faded sums over unique samples that were met again: z times their mean z; 1
        self._step = 0

    @property
    def correlation(self) -> float:
        """ρ in [0, 1]; 0 before any unique sample was met again."""
        products, count = self.met_again
        return float(np.clip(products / count, 0, 1)) if count else 0.0

    def before(self, key: int, step: int) -> tuple[float, float, float]:
        """``(Σ w z, Σ w, Σ w²)`` of a key's earlier visits, as they weigh at a step."""
        if key not in self.of:
            return 0.0, 0.0, 0.0
        scores, weights, squares, last = self.of[key]
        fade = float(np.exp((last - step) / self.window))
        return scores * fade, weights * fade, squares * fade * fade

    def needed(self, keys: Sequence[int], against: Container[int], step: int) -> Tensor:
        """The least z with which a visit's verdict is against its key: ``[n]`` float64; ±infinity where any or no z is.

        Visits of one step do not count for each other.

        Args:
            keys: n, whose visits they are.
            against: the keys whose last verdict was against them.
            step: optimizer step.
        """
        least, rho = np.empty(len(keys)), self.correlation
        for at, key in enumerate(keys):
            scores, weights, squares = self.before(key, step)
            weights, squares = weights + 1, squares + 1
            level = self.least_again if key in against else self.least
            least[at] = level * np.sqrt(squares + rho * (weights * weights - squares)) - scores
        least[least > self.LIMIT], least[least <= -self.LIMIT] = np.inf, -np.inf
        return torch.from_numpy(least)

    def add(self, keys: Sequence[int], scores: Tensor, unique: Sequence[bool], step: int) -> None:
        """Take in the visits of a step, in the order of positions.

        Args:
            keys: n, whose they are.
            scores: ``[n]`` float64, their z.
            unique: n, whether they are samples known to be unique.
            step: optimizer step.
        """
        self.met_again *= np.exp((self._step - step) / self.window)
        self._step = step
        for key, z, is_unique in zip(keys, scores.clamp(-self.LIMIT, self.LIMIT).tolist(), unique, strict=True):
            sums = self.before(key, step)
            if is_unique and sums[1]:
                self.met_again += z * sums[0] / sums[1], 1
            self.of[key] = sums[0] + z, sums[1] + 1, sums[2] + 1, step
        if step % self.window == 0:
            self.of = {key: sums for key, sums in self.of.items() if step - sums[3] < FORGOTTEN * self.window}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to store in a checkpoint."""
        rows = [(key, *sums) for key, sums in self.of.items()]
        return {
            "of": torch.tensor(rows, dtype=torch.float64).view(-1, 5),
            "met_again": torch.tensor([*self.met_again, self._step], dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.of = {int(key): (z, w, w2, int(last)) for key, z, w, w2, last in state["of"].tolist()}
        *sums, step = state["met_again"].tolist()
        self.met_again, self._step = np.array(sums), int(step)

