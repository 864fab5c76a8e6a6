"""Sampling: the denoising loop, its guidance protocol, and the guidance terms.

Nothing is imported before it is asked for, so ``import train.sampling`` stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.sampling.amg import AMG
    from train.sampling.config import AMGConfig, SampleConfig
    from train.sampling.guidance import Correction, Guidance, Part, Run, State
    from train.sampling.job import run_sample
    from train.sampling.pipeline import GuidedOutput, GuidedStableDiffusion

__all__ = [
    "AMG",
    "AMGConfig",
    "Correction",
    "Guidance",
    "GuidedOutput",
    "GuidedStableDiffusion",
    "Part",
    "Run",
    "SampleConfig",
    "State",
    "run_sample",
]

_HOME = {
    "AMG": "amg",
    "AMGConfig": "config",
    "SampleConfig": "config",
    "Correction": "guidance",
    "Guidance": "guidance",
    "Part": "guidance",
    "Run": "guidance",
    "State": "guidance",
    "run_sample": "job",
    "GuidedOutput": "pipeline",
    "GuidedStableDiffusion": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
