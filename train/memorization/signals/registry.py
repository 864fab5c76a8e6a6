"""The protocol of memorization signals: what a signal asks of the denoiser, what it sees, and what it makes of it.

A signal is a small object. :func:`train.memorization.scoring` evaluates the denoiser once for all signals that were
asked for, hands each what it sees, and has it combine the observations of one prompt. Whatever the model predicts, a
signal sees ``ε``.

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

from afresh.errors import UsageError
from train.memorization.signals.agreement import Agreement, Joint, JointOnNoise
from train.memorization.signals.anisotropy import Anisotropy
from train.memorization.signals.attention_entropy import AttentionEntropy
from train.memorization.signals.consistency import Consistency
from train.memorization.signals.magnitude import Form, MeanMagnitude
from train.memorization.signals.protocol import Signal

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

