"""Small Stable Diffusions with random weights: where the sample model begins, and what tests run on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from train.denoising.opening.attention import set_attention

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer


@dataclass
class SmallModel:
    """Architecture of a small Stable Diffusion that is trained from nothing.

    Args:
        vocabulary: tokens of the byte-pair tokenizer, learned from the captions.
        tokens: length of a tokenized caption.
        text_width: width of the CLIP text encoder, and the cross-attention width.
        text_layers: its layers.
        channels: the UNet's width at each resolution (16 × 16 latents first).
        heads: attention heads.
        seed: of the weights.
    """

    vocabulary: int = 1200
    tokens: int = 32
    text_width: int = 128
    text_layers: int = 2
    channels: list[int] = field(default_factory=lambda: [64, 96, 96])
    heads: int = 4
    seed: int = 0


def build_pipeline(model: SmallModel, captions: Sequence[str], vae_dir: str | None) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of small parts with random weights.

    Args:
        model: the architecture.
        captions: texts that the tokenizer's vocabulary is learned from.
        vae_dir: a trained ``AutoencoderKL`` directory; None makes a random one.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(model.seed)
    tokenizer = train_tokenizer(captions, model.vocabulary, model.tokens)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=model.text_width,
            intermediate_size=4 * model.text_width,
            num_hidden_layers=model.text_layers,
            num_attention_heads=max(1, model.text_width // 32),
            max_position_embeddings=model.tokens,
            projection_dim=model.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Attention from the second resolution down: at the first it costs most and adds least at this size.
    crossed = len(model.channels) - 1
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=tuple(model.channels),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * crossed,
        up_block_types=("CrossAttnUpBlock2D",) * crossed + ("UpBlock2D",),
        layers_per_block=1,
        attention_head_dim=model.heads,
        norm_num_groups=min(16, min(model.channels)),
        cross_attention_dim=model.text_width,
    )
    if vae_dir is None:
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
    else:
        vae = AutoencoderKL.from_pretrained(vae_dir, dtype=torch.float32)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    set_attention(pipe.unet)
    return pipe


def train_tokenizer(captions: Sequence[str], vocabulary: int, length: int) -> CLIPTokenizer:
    """A ``CLIPTokenizer`` whose byte-pair merges are learned from ``captions``.

    The vocabulary starts with CLIP's 512 byte symbols, so any text can be tokenized.
    """
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    start, end = "<|startoftext|>", "<|endoftext|>"
    template = CLIPTokenizer().backend_tokenizer  # CLIP's own normalisation and splitting
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    alphabet = sorted(bytes_to_unicode().values())
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocabulary - 2 - len(alphabet), 1) + len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    symbols = list(dict.fromkeys(alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges]))
    vocab = {symbol: i for i, symbol in enumerate([*symbols, start, end])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def tiny_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A random Stable Diffusion of a few thousand weights (64 pixels, latents 4 × 16 × 16), for tests."""
    model = SmallModel(
        vocabulary=600, tokens=16, text_width=32, text_layers=1, channels=[16, 32], heads=2, seed=seed
    )
    return build_pipeline(model, ["grinning face, face smiling", "red apple, food fruit"], vae_dir=None)

