"""Recipe: the untrained flow-matching sample model, a small Stable Diffusion 3 without T5, which ``train finetune``
then trains.

    python -m train.sample_model.flow --config configs/sample_model/flow_untrained.yaml

Its text encoder, tokenizer and autoencoder are the carried sample model's; its transformer has random weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline


@dataclass
class FlowModelConfig:
    """Settings of the recipe.

    Args:
        out: pipeline folder to write.
        start_from: pipeline folder whose text encoder, tokenizer and autoencoder are taken; empty for the carried one.
        layers: joint blocks of the transformer.
        heads: attention heads.
        head_width: width of each.
        seed: of the transformer's weights.
    """

    out: str = "runs/sample_model/flow_untrained"
    start_from: str = ""
    layers: int = 6
    heads: int = 5
    head_width: int = 32
    seed: int = 0


def projected(encoder: Any, layers: int) -> Any:
    """A CLIP text encoder with a pooled output, which is the plain one's last state at the end of the text.

    Args:
        encoder: a ``CLIPTextModel``.
        layers: as many as it has, or more: those pass on what they get. Stable Diffusion 3 reads the last state but
            one, so that with one more it reads the last that was trained.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(**{**encoder.config.to_dict(), "num_hidden_layers": layers})
    pooling = CLIPTextModelWithProjection(config)
    inner = getattr(encoder, "text_model", encoder)  # by the release of transformers
    pooling.text_model.load_state_dict(inner.state_dict(), strict=False)
    for layer in pooling.text_model.encoder.layers[encoder.config.num_hidden_layers :]:
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):  # of a residual branch: nothing is added
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    torch.nn.init.eye_(pooling.text_projection.weight)
    return pooling


def build_flow_pipeline(config: FlowModelConfig) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 pipeline of small parts."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5TokenizerFast

    from train.denoising.opening.loading import load_pipeline, sample_model_dir

    pipe = load_pipeline(config.start_from or str(sample_model_dir()))
    torch.manual_seed(config.seed)
    width, layers = pipe.text_encoder.config.hidden_size, pipe.text_encoder.config.num_hidden_layers
    transformer = SD3Transformer2DModel(
        sample_size=pipe.unet.config.sample_size,
        patch_size=2,
        in_channels=pipe.unet.config.in_channels,
        out_channels=pipe.unet.config.in_channels,
        num_layers=config.layers,
        attention_head_dim=config.head_width,
        num_attention_heads=config.heads,
        joint_attention_dim=2 * width,
        caption_projection_dim=config.heads * config.head_width,
        pooled_projection_dim=2 * width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    with torch.no_grad():  # the encoder's inner states are large
        transformer.context_embedder.weight /= 16
    vae = pipe.vae
    vae.register_to_config(shift_factor=0.0)
    # Without an encoder of its own, its tokenizer says how many empty tokens stand for T5's: one, for the time.
    tokenizer_3 = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    tokenizer_3.model_max_length = 1
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=projected(pipe.text_encoder, layers),
        tokenizer=pipe.tokenizer,
        text_encoder_2=projected(pipe.text_encoder, layers + 1),
        tokenizer_2=pipe.tokenizer,
        text_encoder_3=None,
        tokenizer_3=tokenizer_3,
    )


def main(config: FlowModelConfig) -> None:
    """Draw random weights, save."""
    pipe = build_flow_pipeline(config)
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        print(f"{part}: {sum(p.numel() for p in getattr(pipe, part).parameters()) / 1e6:.2f} M parameters")
    pipe.save_pretrained(config.out)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    main(auto_cli(FlowModelConfig, as_positional=False))
