"""Random models of a few thousand weights of each family, for tests."""

from __future__ import annotations

from typing import Any

import torch

from train.sample_model.small import train_tokenizer

CAPTIONS = ["grinning face, face smiling", "red apple, food fruit"]
TOKENS, WIDTH = 16, 32


def clip(projected: bool, width: int = WIDTH, layers: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """A CLIP text encoder and its tokenizer; ``projected`` is the kind with a pooled output."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = train_tokenizer(CAPTIONS, 600, TOKENS)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval(), tokenizer


def autoencoder(channels: int = 4, **config: Any) -> Any:
    """An ``AutoencoderKL`` that shrinks a side by four."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **config,
    )


def tiny_xl(seed: int = 0, **pipeline: Any) -> Any:
    """A random Stable Diffusion XL (64 pixels, latents 4 × 16 × 16)."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    vae = autoencoder(scaling_factor=0.13025, force_upcast=True)
    text_encoder, tokenizer = clip(False, seed=seed + 1)
    text_encoder_2, tokenizer_2 = clip(True, seed=seed + 2)
    tokenizer_2.pad_token = "!"
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
        **pipeline,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def t5(seed: int = 0) -> tuple[Any, Any]:
    """A T5 encoder and its tokenizer."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    words = sorted({f"▁{word}" for caption in CAPTIONS for word in caption.replace(",", "").split()})
    letters = [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz,"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *[(word, -2.0) for word in words], *letters]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval(), tokenizer


def tiny_sd3(seed: int = 0, with_t5: bool = False) -> Any:
    """A random Stable Diffusion 3 (64 pixels, latents 4 × 16 × 16), with or without T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=24,
    )
    for parameter in transformer.parameters():  # some begin at zero, and the prompt would change nothing
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    vae = autoencoder(scaling_factor=1.5, shift_factor=0.06)
    text_encoder, tokenizer = clip(True, seed=seed + 1)
    text_encoder_2, tokenizer_2 = clip(True, seed=seed + 2)
    text_encoder_3, tokenizer_3 = t5(seed + 3) if with_t5 else (None, None)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux(seed: int = 0, guidance_embeds: bool = True, side: int | None = 16) -> Any:
    """A random FLUX.1: dev, or schnell without ``guidance_embeds``; of so many latents a side until it is saved."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    vae = autoencoder(scaling_factor=0.3611, shift_factor=0.1159)
    text_encoder, tokenizer = clip(False, seed=seed + 1)
    text_encoder_2, tokenizer_2 = t5(seed + 2)
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )
    pipe.default_sample_size = side or pipe.default_sample_size
    pipe.set_progress_bar_config(disable=True)
    return pipe


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of chats, as Qwen's language models write them."""


def language_model(seed: int = 0) -> tuple[Any, Any]:
    """A Qwen3 language model and its tokenizer, of bytes and whole words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer, learner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator([f"user\n{caption} assistant" for caption in CAPTIONS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learner, pad_token=special[0], eos_token=special[2], model_max_length=1024
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Qwen3Model(config).eval(), tokenizer


def tiny_z_image(seed: int = 0) -> Any:
    """A random Z-Image (64 pixels, latents 4 × 16 × 16)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[640, 8, 8],
    )
    for name, parameter in transformer.named_parameters():  # some begin at zero, and the prompt would change nothing
        if not parameter.any() or name.endswith("pad_token"):
            torch.nn.init.normal_(parameter, std=0.05)
    text_encoder, tokenizer = language_model(seed + 1)
    pipe = ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
