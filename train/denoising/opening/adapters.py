"""Low-rank adapters (LoRA, Hu et al., ICLR 2022) on the attention of a model: add, save, fuse.

A weight ``W`` of the base stays as it is, and ``(alpha / rank) B A`` is trained beside it, ``A [rank, in]`` random and
``B [out, rank]`` zero at the start: an untrained adapter changes nothing. Adapters are peft's, and are saved in the
form that ``pipe.load_lora_weights`` of diffusers takes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afresh.errors import UsageError, UserError, reason
from train.denoising.kinds import STABLE_DIFFUSION, family_of
from train.denoising.network import network_of
from train.denoising.opening.files import adapter_options
from train.denoising.opening.outputs import ADAPTERS

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from train.denoising.opening.config import LoRAConfig


WEIGHTS = ADAPTERS
"""The name of a saved file of adapters."""
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
"""Names of a CLIP text encoder's attention weights."""


def add_lora(
    pipe: StableDiffusionPipeline,
    lora: LoRAConfig,
    *,
    text_encoder: bool = False,
    base: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    """Freeze the network and the text encoders and add trainable adapters, in float32, in place.

    Args:
        pipe: a pipeline from ``train.denoising.opening.loading.load_pipeline``.
        lora: rank, scale and place of the adapters.
        text_encoder: give the text encoders adapters too.
        base: dtype that the frozen weights are held in; half precision needs autocast in the forward pass.
        seed: of the adapters' random half.

    Raises:
        UserError: peft is not installed.
        UsageError: a target is the name of no layer of the UNet.
    """
    require_peft()
    from peft import LoraConfig

    adaptable = (torch.nn.Linear, torch.nn.Conv2d)
    network, encoders = network_of(pipe), text_encoders(pipe)
    layers = [name for name, module in network.named_modules() if isinstance(module, adaptable)]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise UsageError(f"lora.targets: no layer of the UNet is called {target}; to_q, to_k, to_v, to_out.0 are")

    def settings(targets: list[str]) -> LoraConfig:
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha or lora.rank,
            lora_dropout=lora.dropout,
            target_modules=targets,
            init_lora_weights=True,
        )

    parts = [network, *encoders.values()]
    for part in parts:
        part.requires_grad_(False).to(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network.add_adapter(settings(lora.targets))
        for encoder in encoders.values():
            if text_encoder and any(layer.endswith(TEXT_TARGETS[0]) for layer, _ in encoder.named_modules()):
                encoder.add_adapter(settings(TEXT_TARGETS))  # CLIP: T5 is not trained
    for parameter in [parameter for part in parts for parameter in part.parameters()]:
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_lora(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the adapters, in float32, to ``folder/pytorch_lora_weights.safetensors``.

    The file's metadata holds rank, alpha and targets, so that it is loaded at the scale it was trained at. The folder
    is written aside and renamed.
    """
    import diffusers
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    layers: dict[str, Any] = {}
    for name, part in parts_of(pipe).items():
        if getattr(part, "peft_config", None):
            state = convert_state_dict_to_diffusers(get_peft_model_state_dict(part))
            layers[f"{name}_lora_layers"] = {key: value.float().contiguous() for key, value in state.items()}
            settings = part.peft_config["default"].to_dict()
            settings["base_model_name_or_path"] = None  # a path of this machine is nothing to publish
            layers[f"{name}_lora_adapter_metadata"] = settings
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    kind = family_of(one.__name__ for one in type(pipe).__mro__) or STABLE_DIFFUSION
    getattr(diffusers, kind.pipeline).save_lora_weights(aside, weight_name=WEIGHTS, **layers)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def fuse_lora(pipe: StableDiffusionPipeline, source: str | Path) -> None:
    """Add saved adapters to the pipeline's weights, in place: afterwards it is a pipeline like any other.

    Args:
        pipe: the pipeline that they were trained on.
        source: a ``.safetensors`` file, a folder that holds one, or a hub name; in any form that diffusers reads.

    Raises:
        UserError: there is no such file, it does not fit the pipeline, or peft is not installed.
    """
    require_peft()
    options = adapter_options(source)
    try:
        pipe.load_lora_weights(str(source), **options)
        adapted = [name for name, part in parts_of(pipe).items() if getattr(part, "peft_config", None)]
        if not adapted:
            raise ValueError(f"it holds no adapters for a {' or a '.join(parts_of(pipe))}")
        pipe.fuse_lora(components=adapted)
        pipe.unload_lora_weights()
    except Exception as error:  # of many kinds, as in load_pipeline
        raise UserError(f"{source}: cannot load the LoRA into this model: {reason(error)}") from error


def text_encoders(pipe: Any) -> dict[str, Any]:
    """A pipeline's text encoders by name, in order, of those that it has."""
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return {name: part for name in names if (part := getattr(pipe, name, None)) is not None}


def parts_of(pipe: Any) -> dict[str, Any]:
    """The parts that may have adapters, by name: the network, and the text encoders."""
    return {"unet" if hasattr(pipe, "unet") else "transformer": network_of(pipe), **text_encoders(pipe)}


def require_peft() -> None:
    """See that peft is there.

    Raises:
        UserError: it is not.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f"LoRA needs peft: pip install 'afresh[lora]' ({error})") from error

