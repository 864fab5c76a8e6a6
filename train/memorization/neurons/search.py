"""The search for the fewest neurons: initial selection and refinement against a criterion.

Source: NeMo (NeurIPS 2024), algorithms 1 and 2; the criterion is theirs, the search takes far fewer passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from train.memorization.neurons.first_step import Criterion, FirstStep
from train.memorization.neurons.value_neurons import (
    Mask,
)

THETA, THETA_STEP, THETA_LEAST = 5.0, 0.25, 1.0
GRADIENT_COST = 3
"""A forward and a backward pass, in forward passes."""
GRADIENT_SEEDS = 2
DOUBT = 1.5
"""A neuron is taken to be needed, untried, where its foretold rise is this many times what the score may still rise."""
BEND = 1.2
"""How much more than the sum of their foretold rises unblocking many neurons is taken to raise the score, at first."""
FEW = 4
"""Doubtful neurons that are tried one after the other, not as rows of one batch."""


class Blocking:
    """The criterion: with these neurons blocked, is the score of every memorized seed below the threshold?

    The score of a set is the highest among the seeds, so one seed that is not below settles it. Seeds are asked one
    before the others, the one that spoke last first: of a set that fails, mostly one pass is all that it takes.

    Args:
        step: the prompt's first step.
        rows: its memorized seeds, by position.
        threshold: ``τ_mem``.
        criterion: what the score is: the similarity to the unblocked step, or else the magnitude.
    """

    def __init__(self, step: FirstStep, rows: Sequence[int], threshold: float, criterion: Criterion = "similarity"):
        self.step, self.rows, self.threshold = step, list(rows), threshold
        self.measure = step.similarity if criterion == "similarity" else step.magnitude

    @torch.no_grad()
    def measures(self, rows: Sequence[int], masks: Mask) -> NDArray[np.float32]:
        """Of each row, with ``masks [rows, units]`` blocked: ``[rows]``."""
        parts, size = [], self.step.batch_size
        factors = torch.from_numpy(~masks).to(self.step.denoiser.device, self.step.denoiser.dtype)
        for start in range(0, len(rows), size):
            parts.append(self.measure(rows[start : start + size], factors[start : start + size]))
        return torch.cat(parts).cpu().numpy()

    def score(self, mask: Mask) -> float:
        """Of a set: the highest of all memorized seeds."""
        return float(self.measures(self.rows, np.tile(mask, (len(self.rows), 1))).max())

    def objection(self, mask: Mask) -> tuple[int, float] | None:
        """A seed whose measure is not below the threshold, and the measure; None if all are below.

        The seed that objected last is asked first, and the others only if it does not.
        """
        for rows in (self.rows[:1], self.rows[1:]):
            if not rows:
                continue
            measures = self.measures(rows, np.tile(mask, (len(rows), 1)))
            worst = int(measures.argmax())
            if measures[worst] >= self.threshold:
                self.rows.remove(rows[worst])
                self.rows.insert(0, rows[worst])
                return rows[worst], float(measures[worst])
        return None

    def passes(self, mask: Mask) -> bool:
        """Whether the score is below the threshold."""
        return self.objection(mask) is None

    def singles(self, mask: Mask, units: NDArray[np.int64]) -> NDArray[np.float32]:
        """What unblocking each unit alone gives on the strictest seed: ``[units]``."""
        masks = np.tile(mask, (len(units), 1))
        masks[np.arange(len(units)), units] = False
        return self.measures(self.rows[:1] * len(units), masks)

    def slope(self, row: int, mask: Mask) -> tuple[float, NDArray[np.float32]]:
        """A seed's measure, and how fast it grows as each unit is unblocked, to first order: ``[units]``."""
        step, before = self.step, self.step.evaluations
        with torch.enable_grad(), step.denoiser.frozen():
            blocked = torch.from_numpy(~mask).to(step.denoiser.device, step.denoiser.dtype)
            factors = blocked[None].requires_grad_()
            measure = self.measure([row], factors).sum()
            slopes = torch.autograd.grad(measure, factors)[0][0]
        step.evaluations += (GRADIENT_COST - 1) * (step.evaluations - before)
        return float(measure.detach()), slopes.float().cpu().numpy()

    def slopes(self, mask: Mask) -> NDArray[np.float32]:
        """The sum of the strictest seeds' slopes: ``[units]``."""
        return np.sum([self.slope(row, mask)[1] for row in self.rows[:GRADIENT_SEEDS]], axis=0)


def candidate_sets(z: NDArray[np.float32], values: NDArray[np.float32], sizes: Mapping[str, int]) -> list[Mask]:
    """The initial selection's growing sets (algorithm 1): ``z > θ`` with θ from 5 down by 0.25 to 1, and in every layer
    the k highest activations with k from 0 up by 1, until they hold every neuron; empty ones are left out.

    Args:
        z: ``[units]``, see :meth:`~train.memorization.neurons.value_neurons.Statistics.z`.
        values: ``[units]``, the prompt's activations.
        sizes: of the layers.
    """
    # rank of each unit in its layer by activation, from 0 for the highest
    parts = np.split(values, np.cumsum(list(sizes.values()))[:-1])
    rank = np.concatenate([np.argsort(np.argsort(-part, kind="stable")) for part in parts])
    steps = [(max(THETA - THETA_STEP * k, THETA_LEAST), k) for k in range(max(sizes.values()) + 1)]
    sets = [(z > theta) | (rank < k) for theta, k in steps]
    return [mask for mask in sets if mask.any()]


def ranked_sets(gains: NDArray[np.float32]) -> list[Mask]:
    """Growing sets of the units that gain most, by the magnitude's slope or by that over their cost: the first, …"""
    rank = np.argsort(np.argsort(-gains, kind="stable"))
    return [rank < n for n in range(1, len(gains) + 1)]


def select(judge: Blocking, sets: Sequence[Mask]) -> Mask | None:
    """The first of growing sets that passes; None where not even the last does.

    The paper tries one after the other. Each set holds the ones before it, so this goes by doubling steps and then by
    halves; the set found passes and the one before it does not.
    """
    low, high = -1, 0
    while not judge.passes(sets[high]):
        if high == len(sets) - 1:
            return None
        low, high = high, min(2 * high + 1, len(sets) - 1)
    while high - low > 1:
        middle = (low + high) // 2
        if judge.passes(sets[middle]):
            high = middle
        else:
            low = middle
    return sets[high]


def refine(judge: Blocking, mask: Mask) -> Mask:
    """Unblock every neuron whose absence is not needed (algorithm 2): the set passes, and no kept one could be spared.

    The paper asks for each layer and then for each neuron, with all seeds, whether the score stays below the threshold
    without it. Here the gradient of a seed's score foretells what each neuron adds as it is unblocked, and as many as
    fit below the threshold are unblocked at once, round by round. It ends where every kept neuron was tried alone
    against the set as it is, or is foretold to lift the score by more than :data:`DOUBT` times what is left. That is
    the one shortcut that proves nothing: ``benchmarks/localize.py`` tries all of them.

    Args:
        judge: the criterion.
        mask: ``[units]``, a set that passes.

    Returns:
        ``[units]``, a part of it.
    """
    mask, needed, stale = mask.copy(), np.zeros(len(mask), bool), False
    while True:
        spared = _sparable(judge, mask, needed)
        mask[spared] = False
        if len(spared):
            stale = bool(needed.any())
        elif stale:  # those that were needed before others were spared are asked again
            needed, stale = np.zeros(len(mask), bool), False
        else:
            return mask


@dataclass
class _Forecast:
    """What unblocking neurons does to one seed's measure, as a gradient foretells it."""

    room: float
    """What is left to the threshold."""
    rises: NDArray[np.float32]
    """``[units]``, of each alone."""
    bend: float = BEND
    """How many times the sum of their rises many together are taken to add."""

    def fitting(self, units: NDArray[np.int64]) -> int:
        """How many, from the first, stay below the threshold together."""
        return int((self.bend * np.cumsum(self.rises[units]) < self.room).sum())

    def learn(self, units: NDArray[np.int64], rise: float) -> None:
        """What unblocking these together did."""
        foretold = float(self.rises[units].sum())
        if foretold > 0:
            self.bend = max(self.bend, 1.1 * rise / foretold)


def _sparable(judge: Blocking, mask: Mask, needed: Mask) -> NDArray[np.int64]:
    """Units of the set, but for the ``needed``, that can be unblocked together, about as many as can; or none.

    Those that are tried alone and cannot be spared become ``needed``.
    """
    forecasts: dict[int, _Forecast] = {}
    asked, most = set(), len(mask)
    while True:
        strictest = judge.rows[0]
        if strictest not in forecasts:
            measure, rises = judge.slope(strictest, mask)
            # the set passes, but for rounding
            forecasts[strictest] = _Forecast(max(judge.threshold - measure, 1e-9), rises)
        shares = np.max([seed.rises / seed.room for seed in forecasts.values()], axis=0)
        pending = np.flatnonzero(mask & ~needed & (shares < DOUBT))
        pending = pending[np.argsort(shares[pending], kind="stable")]
        if not len(pending):
            return pending
        fitting = min(most, *(seed.fitting(pending) for seed in forecasts.values()))
        if not fitting and strictest not in asked and len(pending) > FEW:
            asked.add(strictest)
            measures, seed = judge.singles(mask, pending), forecasts[strictest]
            needed[pending[measures >= judge.threshold]] = True
            seed.rises[pending] = measures - (judge.threshold - seed.room)
            continue
        chosen = pending[: max(fitting, 1)]
        without = mask.copy()
        without[chosen] = False
        if (objection := judge.objection(without)) is None:
            return chosen
        row, measure = objection
        if len(chosen) == 1:
            needed[chosen], most = True, len(mask)
        elif row in forecasts:
            seed = forecasts[row]
            seed.learn(chosen, measure - (judge.threshold - seed.room))
            most = len(chosen) * 3 // 4  # in case the forecast says too little
        else:
            most = len(chosen) - 1

