"""A pipeline's denoiser behind the protocol: that of its family.

A family is a file of this folder, and an entry of ``train/denoising/kinds.py`` that names it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from afresh.errors import UserError
from train.denoising.kinds import STABLE_DIFFUSION, Family, family_of, supported

if TYPE_CHECKING:
    from train.denoising.protocol import Denoiser

def denoiser_of(pipe: Any) -> Denoiser:
    """The denoiser of a pipeline, whose parts it shares; a denoiser is given back as it is.

    Raises:
        UserError: the pipeline is of no family that is known.
    """
    if hasattr(pipe, "schedule") and hasattr(pipe, "predict"):
        return pipe
    return named(pipeline_family(pipe).denoiser)(pipe)


def pipeline_family(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        UserError: it is of none that is known.
    """
    names = [kind.__name__ for kind in type(pipe).__mro__]
    found = family_of(names)
    if found is None and "DiffusionPipeline" not in names and hasattr(pipe, "unet"):
        return STABLE_DIFFUSION  # its parts in other clothes
    if found is None:
        raise UserError(f"{names[0]} is of no family that is known here: {supported()}")
    return found


def named(place: str) -> Any:
    """What a ``module:name`` of a :class:`~train.denoising.kinds.Family` stands for."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
