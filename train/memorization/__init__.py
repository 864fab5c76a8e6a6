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
    from train.memorization.detect import Scores, score
    from train.memorization.explain import Explanation, explain, suggest
    from train.memorization.magnitude import magnitude, to_eps

__all__ = ["Audit", "Explanation", "Scores", "audit", "explain", "magnitude", "score", "suggest", "to_eps"]

_HOME = {
    "magnitude": "magnitude",
    "to_eps": "magnitude",
    "score": "detect",
    "Scores": "detect",
    "explain": "explain",
    "suggest": "explain",
    "Explanation": "explain",
    "audit": "audit",
    "Audit": "audit",
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
