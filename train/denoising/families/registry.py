"""Which family a pipeline is of: its denoiser behind the protocol.

A family is a file of this folder. To add one, write its denoiser after ``stable_diffusion.py`` and name its pipeline's
class here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from afresh.errors import UserError

if TYPE_CHECKING:
    from train.denoising.protocol import Denoiser

STABLE_DIFFUSION = "train.denoising.families.stable_diffusion:StableDiffusionDenoiser"
FAMILIES = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": STABLE_DIFFUSION,
    "StableDiffusionInpaintPipeline": STABLE_DIFFUSION,
    "GuidedStableDiffusion": STABLE_DIFFUSION,
}
"""Class of a pipeline → its family's denoiser."""


def denoiser_of(pipe: Any) -> Denoiser:
    """The denoiser of a pipeline, whose parts it shares; a denoiser is given back as it is.

    Raises:
        UserError: the pipeline is of no family that is known.
    """
    if hasattr(pipe, "schedule") and hasattr(pipe, "predict"):
        return pipe
    names = [kind.__name__ for kind in type(pipe).__mro__]
    found = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if found is None and "DiffusionPipeline" not in names and hasattr(pipe, "unet"):
        found = STABLE_DIFFUSION  # its parts in other clothes
    if found is None:
        raise UserError(f"{names[0]} is of no family that is known here: {', '.join(FAMILIES)}")
    module, _, name = found.partition(":")
    return getattr(import_module(module), name)(pipe)
