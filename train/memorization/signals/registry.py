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

By name it is ``module:Alignment``, or that of an entry point of the group ``afresh.signals``: the class is called
without arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from afresh import plugins
from afresh.errors import UsageError
from train.memorization.signals.agreement import Agreement, Joint, JointOnNoise
from train.memorization.signals.anisotropy import Anisotropy
from train.memorization.signals.attention_entropy import AttentionEntropy
from train.memorization.signals.consistency import Consistency
from train.memorization.signals.magnitude import Form, MeanMagnitude
from train.memorization.signals.masked_magnitude import MaskedMagnitude
from train.memorization.signals.protocol import Signal

SIGNALS: Mapping[str, Callable[[Form], Signal]] = {
    "magnitude": MeanMagnitude,
    "consistency": lambda form: Consistency(),
    "agreement": lambda form: Agreement(),
    "joint": Joint,
    "joint_on_noise": JointOnNoise,
    "anisotropy": lambda form: Anisotropy(),
    "attention_entropy": lambda form: AttentionEntropy(),
    "masked_magnitude": MaskedMagnitude,
}
"""Name → how to make it, given the form of the magnitude."""
MEMBERS = (
    "name", "unconditional", "attention", "compares_seeds", "looks_at", "noise_level", "observe", "combine", "of_prompt"
)  # fmt: skip


def find_signals(signals: Sequence[str | Signal], form: Form, seeds: int) -> list[Signal]:
    """Signals by name, and those that are objects as they are.

    Args:
        signals: at least one, none twice.
        form: of the magnitude.
        seeds: initial noises per prompt.

    Raises:
        UsageError: an unknown name, none, one twice, or too few seeds for one that compares them.
    """
    own = {one: _own(one) for one in signals if isinstance(one, str) and one not in SIGNALS}
    unknown = [name for name, signal in own.items() if signal is None]
    if unknown or not signals:
        known = plugins.choices(plugins.SIGNALS, SIGNALS)
        raise UsageError(f"unknown signal {', '.join(unknown) or 'list []'}: choose from {known}")
    found = [one if not isinstance(one, str) else SIGNALS[one](form) if one in SIGNALS else own[one] for one in signals]
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise UsageError(f"signals: each once, not {', '.join(names)}")
    comparing = [one.name for one in found if one.compares_seeds]
    if comparing and seeds < 2:
        raise UsageError(f"{comparing[0]} compares the seeds of a prompt: give at least 2 seeds")
    return found



def identities(signals: Sequence[str]) -> dict[str, str]:
    """Of the signals that are not ours, by name, what changes when their code does."""
    return {name: plugins.identity(_own(name)) for name in signals if name not in SIGNALS}


def _own(name: str) -> Any:
    protocol = "train.memorization.signals.protocol.Signal"
    return plugins.make(plugins.SIGNALS, name, "signals", MEMBERS, protocol)
