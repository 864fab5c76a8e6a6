"""The protocol of memorization signals: what a signal asks of the denoiser, what it sees, and what it makes of it.

A signal is a small object. :func:`train.memorization.score` evaluates the denoiser once for all signals that were asked
for, hands each what it sees, and has it combine the observations of one prompt. Whatever the model predicts, a signal
sees ``ε``.

    class Alignment:
        name, looks_at, noise_level, unconditional = "alignment", "first step", None, True
        attention = compares_seeds = False

        def observe(self, seen: Seen) -> Tensor:                # one number, or more, for each image
            return torch.cosine_similarity(seen.eps_cond.flatten(1), seen.eps_uncond.flatten(1))

        def combine(self, observed: Tensor) -> Tensor:          # [seeds, observations] → [seeds]
            return observed.mean(dim=1)

        def of_prompt(self, values: Tensor) -> Tensor:          # [seeds] → one number
            return values.mean()

    score(pipe, prompts, signals=["magnitude", Alignment()])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from curate.console import UsageError
from train.memorization.agreement import Agreement, Joint, JointOnNoise
from train.memorization.anisotropy import Anisotropy
from train.memorization.attention_entropy import AttentionEntropy
from train.memorization.consistency import Consistency
from train.memorization.magnitude import Form, MeanMagnitude

LooksAt = Literal["every step", "first step", "no step"]


@dataclass(frozen=True)
class Seen:
    """One evaluation of the denoiser for some images, in ε-space and float32."""

    x_t: Tensor
    """``[n, c, h, w]``; the initial noise at the first step and at a noise level of a signal's own."""
    t: int
    alpha_bar: float
    eps_cond: Tensor
    """``ε(x_t, e_p)``, ``[n, c, h, w]``."""
    eps_uncond: Tensor | None
    """``ε(x_t, e_∅)``; None where no signal asked for it."""
    attention: Mapping[str, Tensor]
    """Cross-attention layer → ``[n, tokens]``: the attention to each token under the prompt, averaged over heads and
    latents; empty where no signal asked for it."""
    on_noise: bool = False
    """Whether this is the initial noise at a signal's :attr:`~Signal.noise_level` rather than a step."""


class Signal(Protocol):
    """What :func:`train.memorization.score` computes; higher means more likely memorized."""

    name: str
    unconditional: bool
    """Reads ``eps_uncond``."""
    attention: bool
    """Reads ``attention``."""

    compares_seeds: bool
    """Needs at least two seeds."""

    @property
    def looks_at(self) -> LooksAt:
        """Which steps of the trajectory it observes, of those that are scored."""
        ...

    @property
    def noise_level(self) -> float | None:
        """Where it observes the initial noise too, after the steps: a share of the schedule, as 0.8 for t = 800 of
        1,000. The denoiser is told that noise is a half-denoised image, and shows what it would make of it.
        """
        ...

    def observe(self, seen: Seen) -> Tensor:
        """What is kept of one evaluation: ``[n, …]``."""
        ...

    def combine(self, observed: Tensor) -> Tensor:
        """All observations of one prompt ``[seeds, observations, …]`` → ``[seeds]``."""
        ...

    def of_prompt(self, values: Tensor) -> Tensor:
        """``[seeds]`` → the prompt's value, of no dimension."""
        ...


SIGNALS: Mapping[str, Callable[[Form], Signal]] = {
    "magnitude": MeanMagnitude,
    "consistency": lambda form: Consistency(),
    "agreement": lambda form: Agreement(),
    "joint": Joint,
    "joint_on_noise": JointOnNoise,
    "anisotropy": lambda form: Anisotropy(),
    "attention_entropy": lambda form: AttentionEntropy(),
}
"""Name → how to make it, given the form of the magnitude."""


def find_signals(signals: Sequence[str | Signal], form: Form, seeds: int) -> list[Signal]:
    """Signals by name, and those that are objects as they are.

    Args:
        signals: at least one, none twice.
        form: of the magnitude.
        seeds: initial noises per prompt.

    Raises:
        UsageError: an unknown name, none, one twice, or too few seeds for one that compares them.
    """
    unknown = [one for one in signals if isinstance(one, str) and one not in SIGNALS]
    if unknown or not signals:
        raise UsageError(f"unknown signal {', '.join(unknown) or 'list []'}: choose from {', '.join(SIGNALS)}")
    found = [SIGNALS[one](form) if isinstance(one, str) else one for one in signals]
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise UsageError(f"signals: each once, not {', '.join(names)}")
    comparing = [one.name for one in found if one.compares_seeds]
    if comparing and seeds < 2:
        raise UsageError(f"{comparing[0]} compares the seeds of a prompt: give at least 2 seeds")
    return found
