"""Evaluation: metrics, the independent judge, the protocol that compares models and guidances, and its
report.

Nothing is imported before it is asked for, so ``import train.evaluation`` stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.evaluation.drawn import Drawn
    from train.evaluation.dual_encoder import DualEncoder
    from train.evaluation.protocol import Judge, evaluate_images
    from train.evaluation.report import Cell, Figure, write_report

__all__ = ["Cell", "Drawn", "DualEncoder", "Figure", "Judge", "evaluate_images", "write_report"]

_HOME = {
    "Cell": "report",
    "Drawn": "drawn",
    "DualEncoder": "dual_encoder",
    "Figure": "report",
    "Judge": "protocol",
    "evaluate_images": "protocol",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
