"""What a single-file checkpoint and a loaded model's configs hold: kinds that cannot be used here are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from afresh.errors import UserError, reason
from train.denoising.kinds import FAMILIES, Family, supported
from train.denoising.opening.files import check_header
from train.denoising.schedules import is_flow


def check_scheduler(scheduler: Any, name: str, steps: int | None = None, *, flow: bool = False) -> None:
    """Refuse a scheduler that no model of the family is drawn with, and one that cannot take so many steps.

    Args:
        scheduler: of diffusers; its timesteps are set where ``steps`` are given.
        name: of the model or option that it comes from, for messages.
        steps: denoising steps.
        flow: whether the model is one of flow matching.

    Raises:
        UserError: it is for flow matching where the model is not, or the other way round; or it cannot take the steps.
    """
    kind = type(scheduler).__name__
    if flow and not is_flow(scheduler):
        raise UserError(f"{name}: {kind} is not for flow matching, by which this model is trained")
    if not flow and not (hasattr(scheduler, "alphas_cumprod") and hasattr(scheduler, "init_noise_sigma")):
        raise UserError(f"{name}: {kind} has no noise schedule of betas (is it for flow matching?); {supported()}")
    if steps is None:
        return
    if getattr(scheduler.config, "use_dynamic_shifting", False):
        return  # the pipeline says by how much
    try:
        scheduler.set_timesteps(steps)
    except Exception as error:  # whatever their arithmetic leads them to
        other = "take another number, or another scheduler, as DDIMScheduler"
        raise UserError(f"{name}: {kind} cannot take {steps} steps ({reason(error)}): {other}") from error


def check_file(path: Path) -> Family:
    """The family of a single-file checkpoint, by the names and shapes in its header alone.

    Raises:
        UserError: it is a pickle, cut short, of another kind, or lacks a part.
    """
    shapes = check_header(path)

    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    header = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kind = infer_diffusers_model_type(header)
    family = next((family for family in FAMILIES if kind in family.files), None)
    made = next((family for family in FAMILIES if kind in family.folders), None)
    if made is not None:
        raise UserError(
            f"{path}: a single file of {made.name} ({kind}), which lacks parts or their tokenizers: make a folder of "
            f"it, diffusers.{made.pipeline}.from_single_file({path.name!r}).save_pretrained(FOLDER), and give that, or "
            "give the model's hub name"
        )
    if family is None:
        raise UserError(f"{path}: a checkpoint of the kind {kind}; {supported()}")
    # v1 is also what it makes of the unknown.
    lacking = [
        part for part, prefix in family.prefixes.items() if not any(name.startswith(prefix) for name in header)
    ]
    if lacking:
        raise UserError(
            f"{path}: not a whole checkpoint of {family.name} in the original layout: it lacks the {', '.join(lacking)}"
        )
    return family


def unsupported(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text_width: int, added: str | None = None
) -> str | None:
    """Why a model's UNet is not one for text to image of its family; None if it is.

    Args:
        unet: config of the UNet.
        vae: config of the VAE.
        text_width: of the text encoders' joined output.
        added: the family's conditioning on more than the caption, if it has one.
    """
    latent = vae["latent_channels"]
    for channels, what in ((unet["in_channels"], "takes"), (unet["out_channels"], "gives")):
        if channels != latent:
            return (
                f"its UNet {what} {channels} channels where latents have {latent}: a model for inpainting, depth, "
                "editing or upscaling"
            )
    if added is not None and unet.get("addition_embed_type") != added:
        return f"its UNet is not conditioned on pooled embeddings and sizes (addition_embed_type is no {added})"
    for option in ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type"):
        if unet.get(option) not in (None, added if option == "addition_embed_type" else None):
            return f"its UNet is conditioned on more than the caption ({option}: {unet[option]})"
    if unet["cross_attention_dim"] != text_width:
        return f"its UNet expects captions of width {unet['cross_attention_dim']}, its text encoder gives {text_width}"
    return None

