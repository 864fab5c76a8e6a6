"""A pipeline as one file in the layout of CompVis and Stability AI, which WebUIs load.

diffusers reads that layout (``from_single_file``) and does not write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afresh.errors import UserError
from afresh.files import write_atomic
from train.denoising.opening.saving import text_encoder_weights

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}


def save_single_file(pipe: StableDiffusionPipeline, path: Path, *, half: bool = False) -> None:
    """Write UNet, VAE and text encoder into one ``.safetensors`` file.

    Args:
        pipe: a Stable Diffusion 1.x or 2.x.
        path: of the file.
        half: write float16 weights.

    Raises:
        UserError: the pipeline is built otherwise than the layout can tell.
    """
    from safetensors.torch import save_file

    weights = original_weights(pipe)
    dtype = torch.float16 if half else torch.float32
    tensors = {name: value.to("cpu", dtype).contiguous() for name, value in weights.items()}
    with write_atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def original_weights(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """All weights of a pipeline by the layout's names and in its shapes.

    Raises:
        UserError: the pipeline is built otherwise than the layout can tell.
    """
    text = text_encoder_weights(pipe)
    if pipe.text_encoder.config.hidden_act == "gelu":  # OpenCLIP's; OpenAI's have quick_gelu
        text = open_clip_weights(text)
    else:
        text = {f"cond_stage_model.transformer.{name}": value for name, value in text.items()}
    unet = original_unet(pipe.unet.state_dict(), pipe.unet.config)
    return unet | original_vae(pipe.vae.state_dict(), len(pipe.vae.config.block_out_channels)) | text


def original_unet(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A UNet's weights by the layout's names.

    Args:
        state: the weights as diffusers names them.
        config: of the UNet.
    """
    blocks = {
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "conv_in.": "input_blocks.0.0.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    layers = config.layers_per_block
    for i in range(len(config.block_out_channels)):
        for j in range(layers):
            place = (layers + 1) * i + j + 1
            blocks[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{place}.0."
            blocks[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{place}.1."
        for j in range(layers + 1):
            blocks[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{(layers + 1) * i + j}.0."
            blocks[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{(layers + 1) * i + j}.1."
        attends = "CrossAttn" in config.up_block_types[i]
        blocks[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{(layers + 1) * (i + 1)}.0.op."
        blocks[f"up_blocks.{i}.upsamplers.0."] = f"output_blocks.{(layers + 1) * i + layers}.{1 + attends}."
    out = {}
    for name, value in state.items():
        block = _first(blocks, name)
        rest = name.removeprefix(block)
        if ".resnets." in block:
            layer = _first(RESNET, rest)
            rest = RESNET[layer] + rest.removeprefix(layer)
        out[f"model.diffusion_model.{blocks[block]}{rest}"] = value
    return out


def original_vae(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A VAE's weights by the layout's names, the attention's as convolutions of 1 × 1.

    Args:
        state: the weights as diffusers names them.
        levels: of resolution.
    """
    changes = {
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "mid_block.attentions.0.to_": "mid.attn_1.",
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
    }
    for i in range(levels):
        changes[f"down_blocks.{i}.resnets"] = f"down.{i}.block"
        changes[f"down_blocks.{i}.downsamplers.0"] = f"down.{i}.downsample"
        changes[f"up_blocks.{i}.resnets"] = f"up.{levels - 1 - i}.block"
        changes[f"up_blocks.{i}.upsamplers.0"] = f"up.{levels - 1 - i}.upsample"
    out = {}
    for name, value in state.items():
        for ours, theirs in changes.items():
            name = name.replace(ours, theirs)
        if "attn_1" in name and value.ndim == 2:
            value = value[:, :, None, None]
        out[f"first_stage_model.{name}"] = value
    return out


def open_clip_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder of Stable Diffusion 2.x by OpenCLIP's names, query, key and value as one matrix.

    The last of OpenCLIP's layers, which the model does not use, is in none of diffusers' folders, and not in the file.
    """
    changes = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.encoder.layers.": "transformer.resblocks.",
        "text_model.final_layer_norm.": "ln_final.",
        ".self_attn.out_proj.": ".attn.out_proj.",
        ".layer_norm1.": ".ln_1.",
        ".layer_norm2.": ".ln_2.",
        ".mlp.fc1.": ".mlp.c_fc.",
        ".mlp.fc2.": ".mlp.c_proj.",
    }
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".k_proj." in name or ".v_proj." in name or name.startswith("text_projection."):
            continue
        if ".q_proj." in name:
            value = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
        for ours, theirs in changes.items():
            name = name.replace(ours, theirs)
        out[f"cond_stage_model.model.{name}"] = value
    return out


def _first(beginnings: Mapping[str, str], name: str) -> str:
    """The one of some beginnings that a name has."""
    found = next((one for one in beginnings if name.startswith(one)), None)
    if found is None:
        raise UserError(f"save_single_file: the layout of single files has no place for the layer {name}")
    return found
