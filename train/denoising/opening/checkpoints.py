"""What a model folder or a single-file checkpoint holds, seen before it is loaded: what is missing, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from afresh.errors import UserError, reason
from afresh.files import read_json

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTED = ("unet", "vae", "text_encoder")
SUPPORTED = "Stable Diffusion 1.x and 2.x (text to image, latents alone into the UNet) can be used here"
KINDS = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "GuidedStableDiffusion",
)
"""Pipeline classes that share Stable Diffusion's parts; what their UNet takes is checked apart."""
ORIGINAL_PARTS = {
    "UNet": "model.diffusion_model.",
    "VAE": "first_stage_model.",
    "text encoder": "cond_stage_model.",
}
"""Prefixes of a single-file checkpoint in the layout of CompVis and Stability AI."""


def check_folder(path: Path, variant: str | None) -> None:
    """See that a diffusers directory has every part, and weights of the variant as safetensors.

    Raises:
        UserError: names what is missing, and what is there in its place.
    """
    if not (path / "model_index.json").is_file():
        raise UserError(f"{path}: not a pipeline folder (it has no model_index.json)")
    check_kind(str(path), read_json(path / "model_index.json"))
    missing = [part for part in PARTS if not (path / part).is_dir() or not any((path / part).iterdir())]
    if missing:
        raise UserError(f"{path}: the model folder lacks {', '.join(missing)}: restore or re-export it")
    for part in WEIGHTED:
        files = [file.name for file in (path / part).glob("*.safetensors")]
        variants = {name.split(".")[1].split("-")[0] for name in files if name.count(".") > 1}
        there = ", ".join(sorted(variants)) or "none"
        plain = any(name.count(".") == 1 for name in files)
        if not files:
            pickles = [*(path / part).glob("*.bin")]
            found = f" but {pickles[0].name}: pickles are never loaded" if pickles else ""
            raise UserError(f"{path}: {part} has no safetensors weights{found}; re-export it as safetensors")
        if variant is None and not plain:
            raise UserError(f"{path}: {part} has weights of variant {there} alone: give --variant")
        if variant is not None and variant not in variants:
            raise UserError(f"{path}: {part} has no weights of variant {variant} (variants there: {there})")


def check_scheduler(scheduler: Any, name: str, steps: int | None = None) -> None:
    """Refuse a scheduler that no Stable Diffusion is drawn with, and one that cannot take so many steps.

    Args:
        scheduler: of diffusers; its timesteps are set where ``steps`` are given.
        name: of the model or option that it comes from, for messages.
        steps: denoising steps.

    Raises:
        UserError: it is for flow matching, or cannot take the steps.
    """
    kind = type(scheduler).__name__
    if not hasattr(scheduler, "alphas_cumprod") or not hasattr(scheduler, "init_noise_sigma"):
        raise UserError(f"{name}: {kind} has no noise schedule of betas (is it for flow matching?); {SUPPORTED}")
    if steps is None:
        return
    try:
        scheduler.set_timesteps(steps)
    except Exception as error:  # whatever their arithmetic leads them to
        other = "take another number, or another scheduler, as DDIMScheduler"
        raise UserError(f"{name}: {kind} cannot take {steps} steps ({reason(error)}): {other}") from error


def check_kind(name: str, index: Mapping[str, Any]) -> None:
    """Refuse a ``model_index.json`` of another kind of pipeline (Stable Diffusion XL, Flux, …) by its name."""
    kind = index.get("_class_name", "none")
    if kind not in KINDS:
        raise UserError(f"{name}: a model of the kind {kind}; {SUPPORTED}")


def check_file(path: Path) -> None:
    """See that a file is a whole Stable Diffusion checkpoint, by the names and shapes in its header alone.

    Raises:
        UserError: it is a pickle, cut short, of another kind, or lacks a part.
    """
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such model file")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: pickles are never loaded, since they can run code; convert it to safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            header = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from error
    kind = infer_diffusers_model_type(header)
    if kind not in ("v1", "v2"):  # v1 is also what it makes of the unknown
        raise UserError(f"{path}: a checkpoint of the kind {kind}; {SUPPORTED}")
    lacking = [
        part for part, prefix in ORIGINAL_PARTS.items() if not any(name.startswith(prefix) for name in header)
    ]
    if lacking:
        raise UserError(
            f"{path}: not a whole Stable Diffusion checkpoint in the original layout: it lacks the {', '.join(lacking)}"
        )


def unsupported(unet: Mapping[str, Any], vae: Mapping[str, Any], text_width: int) -> str | None:
    """Why a model's UNet is not that of Stable Diffusion 1.x or 2.x; None if it is.

    Args:
        unet: config of the UNet.
        vae: config of the VAE.
        text_width: of the text encoder's output.
    """
    latent = vae["latent_channels"]
    for channels, what in ((unet["in_channels"], "takes"), (unet["out_channels"], "gives")):
        if channels != latent:
            return (
                f"its UNet {what} {channels} channels where latents have {latent}: a model for inpainting, depth, "
                "editing or upscaling"
            )
    for option in ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type"):
        if unet.get(option) is not None:
            return f"its UNet is conditioned on more than the caption ({option}: {unet[option]})"
    if unet["cross_attention_dim"] != text_width:
        return f"its UNet expects captions of width {unet['cross_attention_dim']}, its text encoder gives {text_width}"
    return None

