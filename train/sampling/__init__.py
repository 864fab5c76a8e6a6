"""Sampling: the guided pipelines, the protocol of guidance terms, and the terms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afresh.lazy import handed_on

if TYPE_CHECKING:
    from train.sampling.config import AMGConfig, SampleConfig
    from train.sampling.guidance import Change, Correction, Guidance, Part, Run, Start, State
    from train.sampling.job.job import run_sample
    from train.sampling.pipelines.stable_diffusion import GuidedOutput, GuidedStableDiffusion
    from train.sampling.pipelines.unconditional import GuidedImages, GuidedUnconditional
    from train.sampling.similarity import PixelIndex
    from train.sampling.terms.amg import AMG
    from train.sampling.terms.anisotropy import AnisotropyMinimisation
    from train.sampling.terms.attention_masking import AttentionMasking
    from train.sampling.terms.basin import AttractionBasin
    from train.sampling.terms.initial_noise import NoiseAdjustment
    from train.sampling.terms.prompt_embedding import PromptMinimisation
    from train.sampling.terms.random_tokens import RandomTokens
    from train.sampling.terms.rejection import NeverAbove, Rejection

__all__ = [
    "AMG",
    "AMGConfig",
    "AnisotropyMinimisation",
    "AttentionMasking",
    "AttractionBasin",
    "Change",
    "Correction",
    "Guidance",
    "GuidedFlux",
    "GuidedImages",
    "GuidedOutput",
    "GuidedStableDiffusion",
    "GuidedStableDiffusion3",
    "GuidedStableDiffusionXL",
    "GuidedUnconditional",
    "GuidedZImage",
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

__getattr__ = handed_on(
    __name__,
    {
        "AMG": "terms.amg",
        "AMGConfig": "config",
        "AnisotropyMinimisation": "terms.anisotropy",
        "AttentionMasking": "terms.attention_masking",
        "AttractionBasin": "terms.basin",
        "Change": "guidance",
        "Correction": "guidance",
        "Guidance": "guidance",
        "GuidedFlux": "pipelines.flux",
        "GuidedImages": "pipelines.unconditional",
        "GuidedOutput": "pipelines.stable_diffusion",
        "GuidedStableDiffusion": "pipelines.stable_diffusion",
        "GuidedStableDiffusion3": "pipelines.stable_diffusion_3",
        "GuidedStableDiffusionXL": "pipelines.stable_diffusion_xl",
        "GuidedUnconditional": "pipelines.unconditional",
        "GuidedZImage": "pipelines.z_image",
        "NeverAbove": "terms.rejection",
        "NoiseAdjustment": "terms.initial_noise",
        "Part": "guidance",
        "PixelIndex": "similarity",
        "PromptMinimisation": "terms.prompt_embedding",
        "RandomTokens": "terms.random_tokens",
        "Rejection": "terms.rejection",
        "Run": "guidance",
        "SampleConfig": "config",
        "Start": "guidance",
        "State": "guidance",
        "run_sample": "job.job",
    },
)
