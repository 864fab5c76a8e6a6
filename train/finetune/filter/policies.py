"""Which visits of a batch are judged, and what a verdict weighs. Pure functions."""

from __future__ import annotations

import hashlib

from torch import Tensor

from train.finetune.config import FilterConfig
from train.memorization.signals.magnitude import magnitude

NOISIEST_FIFTH = 800
"""The timestep from which on a fifth of uniform ones lie."""


def least_timestep(policy: FilterConfig) -> int:
    """``min_timestep``; that of uniform timesteps where it is left to a run whose own are not known."""
    return NOISIEST_FIFTH if policy.min_timestep is None else policy.min_timestep


def in_turn(rows: Tensor, visits: Tensor, k: int, seed: int) -> Tensor:
    """Whether these visits are the ones in ``k`` at which their samples are judged: ``[n]`` bool.

    Every sample is judged at every k-th of its visits, and different samples at different ones, so that each batch
    holds about as many.

    Args:
        rows: ``[n]`` int64, which samples.
        visits: ``[n]`` int64, how often each was seen before.
        k: at least 1.
        seed: of the run.
    """
    # A multiplicative hash (Knuth): neighbouring rows, which curation often left beside their copies, differ.
    phase = ((rows + 1) * 2654435761 + seed * 40503) % 4294967296 // 65536
    return (visits + phase) % k == 0


def is_judged(
    t: Tensor, captioned: Tensor, rows: Tensor, visits: Tensor, policy: FilterConfig, seed: int
) -> Tensor:
    """Which samples of a batch the filter looks at, before any prediction is made.

    Args:
        t: ``[n]`` int64 timesteps.
        captioned: ``[n]`` bool, False where the caption was dropped for guidance training: such a sample has no
            condition to judge.
        rows: ``[n]`` int64, which samples these are.
        visits: ``[n]`` int64, how often each was seen before.
        policy: the filter's settings.
        seed: of the run.

    Returns:
        ``[n]`` bool.
    """
    judged = captioned.clone()
    if policy.policy == "off":
        judged[:] = False
    if policy.policy in ("noisy_steps", "noisy_one_in_k"):
        judged &= t >= least_timestep(policy)
    if policy.policy in ("one_in_k", "noisy_one_in_k"):
        judged &= in_turn(rows, visits, policy.k, seed)
    return judged


def caption_key(caption: str) -> int:
    """A number in [0, 2³¹) that stands for a caption, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=4).digest(), "little") >> 1


def filter_weights(
    eps_cond: Tensor, eps_uncond: Tensor, thresholds: Tensor, form: str = "l2"
) -> tuple[Tensor, Tensor]:
    """Weights of judged samples in the loss, and the magnitudes they rest on.

    Args:
        eps_cond: ``[n, …]`` noise prediction under the sample's caption, in ε-space.
        eps_uncond: ``[n, …]`` noise prediction under the empty caption.
        thresholds: ``[n]`` smallest magnitude that is left out.
        form: of the magnitude, ``l2`` or ``rms``.

    Returns:
        weights ``[n]`` float32, 0 where dropped and 1 elsewhere; magnitudes ``[n]`` float32.
    """
    m = magnitude(eps_cond, eps_uncond, form=form)  # type: ignore[arg-type]
    return (m < thresholds).float(), m

