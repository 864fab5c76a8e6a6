"""Memorization: how strongly a prompt, rather than the noise, decides what a model draws.

``magnitude`` is the one statistic that the training filter, the detector and the sampler share. Nothing is
imported before it is asked for, so ``import train.memorization`` stays free of torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.memorization.audit import Audit, audit
    from train.memorization.bright_ending import bright_ending, draw_mask
    from train.memorization.explain import Explanation, explain, suggest
    from train.memorization.localize import Localized, localize
    from train.memorization.magnitude import magnitude, to_eps
    from train.memorization.neurons import blocked
    from train.memorization.score import Scores, score

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
    "to_eps",
]

_HOME = {
    "Audit": "audit",
    "Explanation": "explain",
    "Localized": "localize",
    "Scores": "score",
    "audit": "audit",
    "blocked": "neurons",
    "bright_ending": "bright_ending",
    "draw_mask": "bright_ending",
    "explain": "explain",
    "localize": "localize",
    "magnitude": "magnitude",
    "score": "score",
    "suggest": "explain",
    "to_eps": "magnitude",
}


class _Package(ModuleType):
    """Lets a name that is both a file and its main function mean the function, in any order of imports."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


sys.modules[__name__].__class__ = _Package
