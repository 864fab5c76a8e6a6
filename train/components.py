"""Stable Diffusion's parts: load a pipeline, set up attention, encode captions and images, build a small model.

Everything that opens a model goes through :func:`load_pipeline`, whether it is a hub name, a diffusers directory or a
single-file checkpoint, so that a missing part, or a model of another kind, is reported in one way.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from curate.console import UserError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

Attention = Literal["auto", "math", "sdpa", "xformers"]
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
FLOAT16_GAIN = 1024.0
"""Factor on what is differentiated through a float16 model, whose gradients would vanish among its small numbers."""
ORIGINAL_PARTS = {
    "UNet": "model.diffusion_model.",
    "VAE": "first_stage_model.",
    "text encoder": "cond_stage_model.",
}
"""Prefixes of a single-file checkpoint in the layout of CompVis and Stability AI."""


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
) -> StableDiffusionPipeline:
    """Load a Stable Diffusion 1.x or 2.x pipeline, without its safety checker. Weights are safetensors, always.

    Args:
        name_or_path: a diffusers directory, a hub name, or a single ``.safetensors`` checkpoint in the layout of
            CompVis and Stability AI.
        dtype: of the weights.
        attention: see :func:`set_attention`.
        device: where to put it; None leaves it on the CPU.
        revision: branch, tag or commit of a hub name.
        variant: of the weight files of a directory or hub name, as in ``model.fp16.safetensors``.
        model_config: of a single file: diffusers directory or hub name of a model of its architecture, whose configs,
            tokenizer and scheduler are taken (its weights need not be there). None: the one that diffusers recognises
            by the weights, from the hub or its cache.
        lora: folder or file of adapters, which are added to the weights (``train.lora.fuse_lora``).

    Raises:
        UserError: a part of the folder is missing or unreadable, the name cannot be found, or the model is of another
            kind than Stable Diffusion.
    """
    import diffusers
    import transformers

    # Their bars would cross ours, and their warnings (no torchvision here) tell the user nothing to act on.
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    from diffusers import StableDiffusionPipeline

    path = Path(name_or_path)
    is_file = path.is_file() or path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
    options: dict[str, Any] = {"dtype": dtype, "safety_checker": None, "requires_safety_checker": False}
    if is_file:
        check_file(path)
        options |= {"config": model_config}
    else:
        if path.is_dir():
            check_folder(path, variant)
        options |= {"revision": revision, "variant": variant, "use_safetensors": True}
    try:
        if is_file:
            pipe = StableDiffusionPipeline.from_single_file(name_or_path, **options)
        else:
            with contextlib.suppress(OSError):  # not there: what follows says so better
                check_kind(name_or_path, StableDiffusionPipeline.load_config(name_or_path, revision=revision))
            pipe = StableDiffusionPipeline.from_pretrained(name_or_path, **options)
    except UserError:
        raise
    except Exception as error:  # of many kinds: parsers', torch's, the hub's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if is_file:
            reason += (
                f"; is {model_config} of its architecture?"
                if model_config
                else "; a single file holds no configs: give --model_config, a diffusers folder of its architecture"
            )
        raise UserError(f"{name_or_path}: cannot load the model: {reason}") from error
    if (problem := unsupported(pipe.unet.config, pipe.vae.config, pipe.text_encoder.config.hidden_size)) is not None:
        raise UserError(f"{name_or_path}: {problem}; {SUPPORTED}")
    pipe.set_progress_bar_config(disable=True)
    if lora:
        from train.lora import fuse_lora

        fuse_lora(pipe, lora)
    if device is not None:
        pipe.to(device)
    set_attention(pipe.unet, attention)
    return pipe


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


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


def check_trainable(pipe: StableDiffusionPipeline, name: str) -> None:
    """Refuse what can be drawn from, but not trained here.

    Args:
        pipe: a pipeline from :func:`load_pipeline`.
        name: of the model, for messages.

    Raises:
        UserError: the model predicts neither ε nor v, or is distilled for a few guided steps.
    """
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


def open_pipeline(config: Any) -> StableDiffusionPipeline:
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


def set_attention(unet: UNet2DConditionModel, attention: Attention = "auto", *, mixed_precision: str = "no") -> None:
    """Choose how the UNet computes attention.

    ``auto`` is ``sdpa`` but for small models that train in bf16 on a CPU: there the plain matrix form is faster, as
    torch's fused kernel is slow in its backward pass on short sequences (``python -m benchmarks.attention``).

    Args:
        unet: on its device.
        attention: ``math`` is the plain matrix form.
        mixed_precision: no, fp16 or bf16: in which it is going to compute, whatever its weights are.

    Raises:
        UserError: xformers was asked for and is not installed.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if attention == "auto":
        side = unet.config.sample_size if isinstance(unet.config.sample_size, int) else 64
        small = unet.device.type == "cpu" and side <= 16
        attention = "math" if small and mixed_precision == "bf16" else "sdpa"
    if attention == "xformers":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise UserError(f"attention xformers: {error}; pip install 'afresh[xformers]'") from error
    else:
        unet.set_attn_processor(AttnProcessor() if attention == "math" else AttnProcessor2_0())


def tokenize(pipe: StableDiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """Token ids padded to the tokenizer's length: ``[n, tokens]`` int64. Longer captions are cut."""
    return pipe.tokenizer(
        list(captions),
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


@torch.no_grad()
def encode_captions(pipe: StableDiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """The text encoder's output ``[n, tokens, width]`` for captions, on the pipeline's device."""
    return pipe.text_encoder(tokenize(pipe, captions).to(pipe.text_encoder.device))[0]


def latent_shape(unet: UNet2DConditionModel) -> tuple[int, int, int]:
    """``(c, h, w)`` of the latents that the UNet takes by default."""
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return int(unet.config.in_channels), int(height), int(width)


def initial_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """``x_T`` of a seed, float32 on the CPU: one noise on every device and in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def frozen(unet: UNet2DConditionModel, *, checkpointing: bool = False) -> Iterator[None]:
    """The UNet without gradients of its weights while the block runs, so that those of its inputs cost less memory.

    Args:
        unet: left as it was when the block ends.
        checkpointing: compute activations again in the backward pass instead of keeping them: about a third more time
            for a fraction of the memory.
    """
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    switch = checkpointing and not unet.is_gradient_checkpointing
    for parameter in parameters:
        parameter.requires_grad_(False)
    if switch:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if switch:
            unet.disable_gradient_checkpointing()
        for parameter in parameters:
            parameter.requires_grad_(True)


def pixel_size(pipe: StableDiffusionPipeline) -> int:
    """Side in pixels of the images that the pipeline draws by default."""
    return int(pipe.unet.config.sample_size) * pipe.vae_scale_factor


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
