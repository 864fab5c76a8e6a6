"""Open a model of a known family: a hub name, a diffusers directory or a single-file checkpoint.

Everything that opens a model goes through :func:`load_pipeline`, so that a missing part, or a model of another kind, is
reported in one way.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afresh.errors import UserError, reason
from train.denoising.kinds import STABLE_DIFFUSION, supported
from train.denoising.network import network_of
from train.denoising.opening.attention import Attention, set_attention
from train.denoising.opening.checkpoints import check_file, check_scheduler, unsupported
from train.denoising.opening.files import check_kind, check_model, is_single_file
from train.denoising.opening.outputs import model_file
from train.denoising.schedules import is_flow

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def load_pipeline(
    name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
    lora: str | None = None,
) -> Any:
    """Load a pipeline of a known family (:mod:`train.denoising.kinds`), without its safety checker or watermark.
    Weights are safetensors, always.

    Args:
        name_or_path: a diffusers directory, a hub name, or a single ``.safetensors`` checkpoint in the layout of
            CompVis and Stability AI, or the output folder of a trainer that leaves one.
        dtype: of the weights.
        attention: see :func:`set_attention`.
        device: where to put it; None leaves it on the CPU.
        revision: branch, tag or commit of a hub name.
        variant: of the weight files of a directory or hub name, as in ``model.fp16.safetensors``.
        model_config: of a single file: diffusers directory or hub name of a model of its architecture, whose configs,
            tokenizer and scheduler are taken (its weights need not be there). None: the one that diffusers recognises
            by the weights, from the hub or its cache.
        lora: folder or file of adapters, which are added to the weights
            (``train.denoising.opening.adapters.fuse_lora``).

    Raises:
        UserError: a part of the folder is missing or unreadable, the name cannot be found, or the model is of another
            kind than is known here, or its scheduler for flow matching.
    """
    check_model(name_or_path := model_file(name_or_path), variant)  # before anything else is imported

    import diffusers
    import transformers

    # Their bars would cross ours, and their warnings (no torchvision here) tell the user nothing to act on.
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    path = Path(name_or_path)
    is_file = is_single_file(path)
    family, left_out = (check_file(path) if is_file else STABLE_DIFFUSION), {}
    try:
        if is_file:
            options: dict[str, Any] = {"dtype": dtype, "config": model_config, **family.options}
            pipe = getattr(diffusers, family.pipeline).from_single_file(name_or_path, **options)
        else:
            with contextlib.suppress(OSError):  # not there: what follows says so better
                index = diffusers.DiffusionPipeline.load_config(name_or_path, revision=revision)
                family = check_kind(name_or_path, index)
                left_out = {part: None for part in family.optional if index.get(part) in (None, [None, None])}
            options = {"dtype": dtype, "revision": revision, "variant": variant, **family.options, **left_out}
            pipe = getattr(diffusers, family.pipeline).from_pretrained(name_or_path, use_safetensors=True, **options)
    except UserError:
        raise
    except Exception as error:  # of many kinds: parsers', torch's, the hub's
        why = reason(error)
        if is_file:
            why += (
                f"; is {model_config} of its architecture?"
                if model_config
                else "; a single file holds no configs: give --model_config, a diffusers folder of its architecture"
            )
        raise UserError(f"{name_or_path}: cannot load the model: {why}") from error
    if family.network == "unet":
        width = sum(getattr(pipe, encoder).config.hidden_size for encoder in family.encoders)
        if (problem := unsupported(pipe.unet.config, pipe.vae.config, width, family.added)) is not None:
            raise UserError(f"{name_or_path}: {problem}; {supported()}")
    check_scheduler(pipe.scheduler, name_or_path, flow=family.flow)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        from train.denoising.opening.adapters import fuse_lora

        fuse_lora(pipe, lora)
    if device is not None:
        pipe.to(device)
    set_attention(network_of(pipe), attention)
    return pipe


def check_trainable(pipe: StableDiffusionPipeline, name: str) -> None:
    """Refuse what can be drawn from, but not trained here.

    Args:
        pipe: a pipeline from :func:`load_pipeline`.
        name: of the model, for messages.

    Raises:
        UserError: the model predicts neither ε nor v, or is distilled for a few guided steps.
    """
    if network_of(pipe).config.get("guidance_embeds") is False:
        raise UserError(f"{name}: a model distilled to a few steps (FLUX.1 schnell) cannot be trained here: take dev")
    if is_flow(pipe.scheduler):
        return
    kind = pipe.scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"{name}: a model that predicts {kind!r} cannot be trained here: epsilon and v_prediction can")
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise UserError(f"{name}: a model distilled to take the guidance scale as an input cannot be trained here")


def chosen_device(device: str) -> str:
    """A job's ``device``; ``auto`` is a GPU where there is one. Of several processes on a machine each has its own."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and os.environ.get("LOCAL_RANK"):
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def open_pipeline(config: Any) -> Any:
    """The pipeline that a job's settings name: :func:`load_pipeline` with their fields of the same names.

    Args:
        config: with ``model``, ``dtype``, ``device`` (see :func:`chosen_device`), ``revision``, ``variant``,
            ``model_config`` and ``lora``.

    Raises:
        UserError: as :func:`load_pipeline`.
    """
    return load_pipeline(
        config.model,
        dtype=getattr(torch, config.dtype),
        device=chosen_device(config.device),
        revision=config.revision,
        variant=config.variant,
        model_config=config.model_config,
        lora=config.lora,
    )


def sample_model_dir() -> Path:
    """Folder of the carried sample model."""
    return Path(__file__).parents[2] / "assets" / "sample_model"
