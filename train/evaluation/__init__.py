"""Evaluation: the judges, the metrics, the protocol that compares models and guidances, and its reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afresh.lazy import handed_on

if TYPE_CHECKING:
    from train.evaluation.judging.drawn import Drawn
    from train.evaluation.judging.dual_encoder import DualEncoder
    from train.evaluation.metrics.dual_encoder import DualEncoderJudge
    from train.evaluation.metrics.measuring import evaluate_images
    from train.evaluation.metrics.protocol import Reference
    from train.evaluation.reporting.figure import Cell, Figure
    from train.evaluation.reporting.report import write_report

__all__ = [
    "Cell",
    "Drawn",
    "DualEncoder",
    "DualEncoderJudge",
    "Figure",
    "Reference",
    "evaluate_images",
    "write_report",
]

__getattr__ = handed_on(
    __name__,
    {
        "Cell": "reporting.figure",
        "Drawn": "judging.drawn",
        "DualEncoder": "judging.dual_encoder",
        "DualEncoderJudge": "metrics.dual_encoder",
        "Figure": "reporting.figure",
        "Reference": "metrics.protocol",
        "evaluate_images": "metrics.measuring",
        "write_report": "reporting.report",
    },
)
