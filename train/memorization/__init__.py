"""Memorization: how strongly a prompt, rather than the noise, decides what a model draws.

``magnitude`` is the one statistic that the training filter, the detector and the sampler share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from afresh.lazy import handed_on

if TYPE_CHECKING:
    from train.memorization.auditing import Audit, audit
    from train.memorization.end_attention import bright_ending, draw_mask
    from train.memorization.explaining.changes import suggest
    from train.memorization.explaining.explanation import Explanation
    from train.memorization.explaining.significance import explain
    from train.memorization.neurons.blocking import blocked
    from train.memorization.neurons.localization import Localized, localize
    from train.memorization.scoring import Scores, score
    from train.memorization.signals.magnitude import magnitude

__all__ = [
    "Audit",
    "Explanation",
    "Localized",
    "Scores",
    "audit",
    "blocked",
    "bright_ending",
    "draw_mask",
    "explain",
    "localize",
    "magnitude",
    "score",
    "suggest",
]

__getattr__ = handed_on(
    __name__,
    {
        "Audit": "auditing",
        "Explanation": "explaining.explanation",
        "Localized": "neurons.localization",
        "Scores": "scoring",
        "audit": "auditing",
        "blocked": "neurons.blocking",
        "bright_ending": "end_attention",
        "draw_mask": "end_attention",
        "explain": "explaining.significance",
        "localize": "neurons.localization",
        "magnitude": "signals.magnitude",
        "score": "scoring",
        "suggest": "explaining.changes",
    },
)
