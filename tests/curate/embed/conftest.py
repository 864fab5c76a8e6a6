"""Small models with random weights, as their libraries save them, and images of several shapes."""

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.curate.embed.made_models import WIDTHS

VISION = {**WIDTHS, "image_size": 32, "patch_size": 8}
CLIP_SIZE = {"size": {"shortest_edge": 36}, "crop_size": 32}
SIGLIP_SIZE = {"size": {"height": 32, "width": 32}}
DINOV2_SIZE = {"size": {"shortest_edge": 40}, "crop_size": 32}


@pytest.fixture(scope="session")
def models(tmp_path_factory, tiny_pipe) -> Path:
    """Folders of small models with random weights: each library's own classes saved them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokens = {"vocab_size": len(tiny_pipe.tokenizer), "max_position_embeddings": 64,
              "bos_token_id": tiny_pipe.tokenizer.bos_token_id, "eos_token_id": tiny_pipe.tokenizer.eos_token_id,
              "pad_token_id": tiny_pipe.tokenizer.pad_token_id}  # fmt: skip
    clip_text, clip_vision = {**WIDTHS, **tokens, "projection_dim": 24}, {**VISION, "projection_dim": 24}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=clip_text, vision_config=clip_vision, projection_dim=24)
    )
    siglip_text = {**WIDTHS, **tokens, "projection_size": 32}
    siglip = transformers.SiglipModel(transformers.SiglipConfig(text_config=siglip_text, vision_config=VISION))
    dinov2 = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=8
    )
    registers = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=8
    )
    dinov3 = transformers.DINOv3ViTConfig(**WIDTHS, image_size=32, patch_size=8, num_register_tokens=2)
    parts = {
        "clip": (clip, CLIPImageProcessorPil(**CLIP_SIZE)),
        "clip-vision": (
            transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**clip_vision)),
            CLIPImageProcessorPil(**CLIP_SIZE),
        ),
        "clip-vision-projected": (
            transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**clip_vision)),
            CLIPImageProcessorPil(**CLIP_SIZE),
        ),
        "siglip": (siglip, SiglipImageProcessorPil(**SIGLIP_SIZE)),
        "siglip-vision": (
            transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
            SiglipImageProcessorPil(**SIGLIP_SIZE),
        ),
        "dinov2": (transformers.Dinov2Model(dinov2), BitImageProcessorPil(**DINOV2_SIZE)),
        "dinov3": (transformers.DINOv3ViTModel(dinov3), BitImageProcessorPil(**DINOV2_SIZE)),
        "registers": (transformers.Dinov2WithRegistersModel(registers), BitImageProcessorPil(**DINOV2_SIZE)),
    }
    for name, (model, processor) in parts.items():
        for parameter in model.parameters():  # initialised so small, every image would have the same vector
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    text = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**clip_text))
    text.save_pretrained(folder / "clip-text")
    bare = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip_text))
    bare.save_pretrained(folder / "clip-text-bare")  # as Stable Diffusion has it
    for name in ("clip", "siglip", "clip-text", "clip-text-bare"):
        tiny_pipe.tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def images(emoji):
    """Of several shapes."""
    shapes = ((64, 64), (90, 64), (64, 71), (200, 180))
    return [image.resize(shapes[i % 4], Image.Resampling.LANCZOS) for i, (image, _) in enumerate(emoji[:12])]
