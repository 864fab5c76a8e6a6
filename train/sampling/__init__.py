"""Sampling: the denoising loop, its guidance protocol, and the guidance terms.

Nothing is imported before it is asked for, so ``import train.sampling`` stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.sampling.amg import AMG
    from train.sampling.basin import AttractionBasin
    from train.sampling.config import AMGConfig, SampleConfig
    from train.sampling.guidance import Change, Correction, Guidance, Part, Run, Start, State
    from train.sampling.job import run_sample
    from train.sampling.noise import NoiseAdjustment
    from train.sampling.pipeline import GuidedOutput, GuidedStableDiffusion
    from train.sampling.prompt import PromptMinimisation
    from train.sampling.rejection import NeverAbove, Rejection
    from train.sampling.similarity import PixelIndex
    from train.sampling.tokens import RandomTokens
    from train.sampling.unconditional import GuidedImages, GuidedUnconditional

__all__ = [
    "AMG",
    "AMGConfig",
    "AttractionBasin",
    "Change",
    "Correction",
    "Guidance",
    "GuidedImages",
    "GuidedOutput",
    "GuidedStableDiffusion",
    "GuidedUnconditional",
    "NeverAbove",
    "NoiseAdjustment",
    "Part",
    "PixelIndex",
    "PromptMinimisation",
    "RandomTokens",
    "Rejection",
    "Run",
    "SampleConfig",
    "Start",
    "State",
    "run_sample",
]

_HOME = {
    "AMG": "amg",
    "AMGConfig": "config",
    "AttractionBasin": "basin",
    "Change": "guidance",
    "Correction": "guidance",
    "Guidance": "guidance",
    "GuidedImages": "unconditional",
    "GuidedOutput": "pipeline",
    "GuidedStableDiffusion": "pipeline",
    "GuidedUnconditional": "unconditional",
    "NeverAbove": "rejection",
    "NoiseAdjustment": "noise",
    "Part": "guidance",
    "PixelIndex": "similarity",
    "PromptMinimisation": "prompt",
    "RandomTokens": "tokens",
    "Rejection": "rejection",
    "Run": "guidance",
    "SampleConfig": "config",
    "Start": "guidance",
    "State": "guidance",
    "run_sample": "job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
