"""Adapters whose change of a weight is a product of another kind than LoRA's, by peft: LoHa and LoKr.

LoHa's is the elementwise product of two low-rank matrices (Hyeon-Woo et al., "FedPara", ICLR 2022), LoKr's a Kronecker
product (Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", ICLR 2024).
diffusers loads neither, peft does: ``PeftModel.from_pretrained(pipe.unet, folder)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from train.denoising.opening.config import LoRAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""How peft calls what it loads."""
OTHERS = "lycoris.safetensors"
"""The same by LyCORIS's names, which ComfyUI and other interfaces read."""
SCALED = ("hada_w1_a", "lokr_w1", "lokr_w1_a")
"""The factor of each product that takes its scale."""


def lycoris_settings(lora: LoRAConfig) -> Any:
    """Peft's settings of LoHa or LoKr adapters."""
    import peft

    kind: Any = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[lora.kind]
    factor = {"decompose_factor": lora.factor} if lora.kind == "lokr" else {}
    return kind(r=lora.rank, alpha=lora.alpha or lora.rank, target_modules=lora.targets, **factor)


def is_lycoris(source: str | Path) -> bool:
    """Whether a folder holds adapters in peft's own form, as :func:`save_lycoris` writes them."""
    return (Path(source) / CONFIG).is_file()


def save_lycoris(network: Any, folder: Path, prefix: str) -> None:
    """Write a network's adapters, in float32, in peft's form and by LyCORIS's names.

    Args:
        network: with adapters.
        folder: which exists.
        prefix: how the names of its layers begin in LyCORIS's file.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    settings = network.peft_config["default"]
    state = {name: x.float().contiguous().cpu() for name, x in get_peft_model_state_dict(network).items()}
    settings.inference_mode, settings.base_model_name_or_path = True, None  # a path of this machine is not published
    settings.save_pretrained(folder)
    save_file({f"base_model.model.{name}": x for name, x in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    named = lycoris_weights(state, prefix, settings.alpha / settings.r, settings.r)
    save_file(named, folder / OTHERS, metadata={"format": "pt"})


def lycoris_weights(state: Mapping[str, torch.Tensor], prefix: str, scale: float, rank: int) -> dict[str, torch.Tensor]:
    """Adapters by LyCORIS's names. Its readers scale a whole matrix otherwise than peft, so the weights have the scale.

    Args:
        state: by peft's names.
        prefix: how the names of layers begin there.
        scale: of what they add.
        rank: of the adapters.
    """
    out = {}
    for name, value in state.items():
        layer, _, factor = name.rpartition(".")
        layer = f"{prefix}_{layer.replace('.', '_')}"
        out[f"{layer}.{factor}"] = value * scale if factor in SCALED else value
        out[f"{layer}.alpha"] = torch.tensor(float(rank))
    return out


def fuse_lycoris(network: Any, folder: str | Path) -> None:
    """Add the adapters of a folder to a network's weights, in place."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(network, str(folder)).merge_and_unload()
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(network):
            delattr(network, name)
