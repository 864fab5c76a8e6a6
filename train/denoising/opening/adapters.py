"""Low-rank adapters (LoRA, Hu et al., ICLR 2022) on the attention of a model: add, save, fuse.

A weight ``W`` of the base stays as it is, and ``(alpha / rank) B A`` is trained beside it, ``A [rank, in]`` random and
``B [out, rank]`` zero at the start: an untrained adapter changes nothing. Adapters are peft's, and are saved in the
form that ``pipe.load_lora_weights`` of diffusers takes.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afresh.errors import UsageError, UserError, reason
from train.denoising.kinds import ENCODERS, STABLE_DIFFUSION, XL, family_of
from train.denoising.network import network_of
from train.denoising.opening.files import adapter_options
from train.denoising.opening.lycoris import fuse_lycoris, is_lycoris, lycoris_settings, save_lycoris
from train.denoising.opening.outputs import ADAPTERS
from train.denoising.opening.quantized import quantize
from train.denoising.opening.saving import prefixed

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from train.denoising.opening.config import LoRAConfig


WEIGHTS = ADAPTERS
"""The name of a saved file of adapters."""
UP = (".up.weight", ".lora_B.weight")
"""How the names of adapters' second matrices end, by diffusers' names."""
KOHYA = {
    STABLE_DIFFUSION.name: {"unet": "lora_unet", "text_encoder": "lora_te"},
    XL.name: {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
"""How the names of a part's layers begin in kohya's files. Of transformers interfaces read diffusers' own form."""
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

    def settings(targets: list[str]) -> Any:
        if lora.kind != "lora":
            return lycoris_settings(lora)
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha or lora.rank,
            lora_dropout=lora.dropout,
            target_modules=targets,
            use_dora=lora.dora,
            init_lora_weights=True,
        )

    parts = [network, *encoders.values()]
    for part in parts:
        part.requires_grad_(False).to(base)
    quantize(network, lora.quantize, base)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of merging into quantised weights, which is not done
        torch.manual_seed(seed)
        network.add_adapter(settings(lora.targets))
        for encoder in encoders.values():
            if text_encoder and any(layer.endswith(TEXT_TARGETS[0]) for layer, _ in encoder.named_modules()):
                encoder.add_adapter(settings(TEXT_TARGETS))  # CLIP: T5 is not trained
    for parameter in [parameter for part in parts for parameter in part.parameters()]:
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_lora(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the adapters, in float32, to ``folder/pytorch_lora_weights.safetensors``, as diffusers has them, and those
    of Stable Diffusion 1.x, 2.x and XL to ``folder/kohya.safetensors``, as ComfyUI and other interfaces do; LoHa and
    LoKr as :func:`save_lycoris` does.

    Both are loaded at the scale they were trained at. Older releases of diffusers do not read an alpha of the first
    form, so it has the scale in its weights, under an alpha that equals the rank; the second has an alpha a layer. The
    folder is written aside and renamed.
    """
    import diffusers
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    kind = family_of(one.__name__ for one in type(pipe).__mro__) or STABLE_DIFFUSION
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    network = network_of(pipe)
    if network.peft_config["default"].peft_type != "LORA":
        aside.mkdir(parents=True)
        save_lycoris(network, aside, "lora_unet" if hasattr(pipe, "unet") else "lora_transformer")
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        return
    kohya: dict[str, torch.Tensor] = {}
    layers: dict[str, Any] = {}
    for name, part in parts_of(pipe).items():
        if getattr(part, "peft_config", None):
            state = convert_state_dict_to_diffusers(get_peft_model_state_dict(part))
            state = {key: value.float().contiguous().cpu() for key, value in state.items()}
            state = state if part is network_of(pipe) else prefixed(state)
            settings = part.peft_config["default"].to_dict()
            alpha, rank = settings["lora_alpha"], settings["r"]
            if kind.name in KOHYA and not settings["use_dora"]:
                kohya |= kohya_weights(state, KOHYA[kind.name][name], alpha)
            scaled = {key: x * (alpha / rank) if key.endswith(UP) else x for key, x in state.items()}
            layers[f"{name}_lora_layers"] = scaled
            settings["lora_alpha"] = rank
            settings["base_model_name_or_path"] = None  # a path of this machine is nothing to publish
            layers[f"{name}_lora_adapter_metadata"] = settings
    getattr(diffusers, kind.pipeline).save_lora_weights(aside, weight_name=WEIGHTS, **layers)
    if kohya:
        save_file(kohya, aside / "kohya.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def kohya_weights(state: Mapping[str, torch.Tensor], part: str, alpha: float) -> dict[str, torch.Tensor]:
    """Adapters by the names of kohya's scripts, which most interfaces read.

    Args:
        state: weights of one part by diffusers' names.
        part: how the names of its layers begin there.
        alpha: a layer's output is scaled by this over the rank.
    """
    ends = {"A": "down", "B": "up", "down": "down", "up": "up"}
    out = {}
    for name, value in state.items():
        layer, _, rest = name.rpartition(".lora")  # .lora.down, .lora_linear_layer.down or .lora_A, as the part has it
        layer = f"{part}_{layer.replace('.', '_')}"
        end = rest.removesuffix(".weight").rpartition("_" if rest.count(".") == 1 else ".")[2]
        out[f"{layer}.lora_{ends[end]}.weight"] = value
        out[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return out


def fuse_lora(pipe: StableDiffusionPipeline, source: str | Path) -> None:
    """Add saved adapters to the pipeline's weights, in place: afterwards it is a pipeline like any other.

    Args:
        pipe: the pipeline that they were trained on.
        source: a ``.safetensors`` file, a folder that holds one, or a hub name; in any form that diffusers reads, or a
            folder in peft's form.

    Raises:
        UserError: there is no such file, it does not fit the pipeline, or peft is not installed.
    """
    require_peft()
    options = adapter_options(source)
    try:
        if is_lycoris(source):
            fuse_lycoris(network_of(pipe), source)
            return
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
    return {name: part for name in ENCODERS if (part := getattr(pipe, name, None)) is not None}


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

