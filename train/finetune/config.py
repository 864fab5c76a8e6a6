"""Settings of ``train finetune``: plain dataclasses, read from YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from train.denoising.opening.config import LoRAConfig
from train.finetune.data.config import Augmentation, Buckets, RandomWords, ShardGroup, Tags
from train.finetune.filter.config import Calibration as Calibration
from train.finetune.filter.config import FilterConfig
from train.finetune.model.config import Flow, Timesteps


@dataclass
class ValidationConfig:
    """Images of fixed prompts and the loss on held-out samples, at intervals, of the weights that would be saved then.

    Args:
        every: optimizer steps between them; 0 for neither.
        prompts: texts to draw, one image each, into ``out/validation/step-000500/``.
        shards: of samples that are not trained on; their loss, with the same noise each time, goes to
            ``out/validation/loss.jsonl``.
        samples: how many of them are measured on.
        guidance: none, amg, or amg-strong, as in ``train sample``; nothing is drawn again.
        index: training-set index for the guidance: the output folder of curate dedup, or its index folder.
        steps: denoising steps.
        scale: classifier-free guidance scale.
        negative_prompt: what the images are guided away from; empty for nothing.
        width: of the images in pixels; 0 is the model's own, as of the height.
        height: likewise.
        seed: of every image.
    """

    every: int = 0
    prompts: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    samples: int = 64
    guidance: Literal["none", "amg", "amg-strong"] = "none"
    index: str = ""
    steps: int = 25
    scale: float = 7.5
    negative_prompt: str = ""
    width: int = 0
    height: int = 0
    seed: int = 0


@dataclass
class FinetuneConfig:
    """Settings of a training run.

    Args:
        model: pipeline folder, hub name or single-file checkpoint (.safetensors) to start from.
        revision: branch, tag or commit of a hub name.
        variant: of the weight files, as in model.fp16.safetensors; null takes those without one.
        model_config: of a single file: a pipeline folder of its architecture, for the configs, tokenizer and scheduler
            that a single file lacks; null asks the hub for those of the checkpoint's kind.
        out: folder of the run: ``model/`` (the result), ``checkpoints/``, ``validation/``, ``log.jsonl``,
            ``report.html`` (the run on a page, at each checkpoint), ``verdicts.parquet``, ``filter.json`` (the
            thresholds), ``summary.json``.
        shards: tar shards: paths, globs, brace ranges, folders or fsspec URLs; or ``{path: …, repeats: n,
            weight: w}``. A folder of images, ``*.parquet`` files and ``dataset:NAME`` (a Hugging Face dataset, of the
            hub or a folder) are imported into ``out/imported`` first, as by ``curate import``.
        exclude: a list of samples that are not trained on, as ``train verdicts`` writes it; empty for none.
        steps: optimizer steps. A run, finished or not, goes on to more of them under ``lr_schedule: constant``.
        epochs: passes over the data in place of ``steps``; 0 goes by ``steps``.
        batch_size: samples a process takes in one forward pass.
        gradient_accumulation: forward passes per optimizer step.
        auto_batch_size: when memory runs out, take half the batch_size and twice the gradient_accumulation, and go on
            from the newest checkpoint; the optimizer step stays what it was. The size that fits is kept in
            ``out/batch.json``. Of several processes none can wait for one that failed: the run stops, and takes the
            smaller batch when it is started again.
        optimizer: adamw, adafactor, adamw8bit, lion, lion8bit (bitsandbytes), prodigy (prodigyopt; takes learning_rate
            1), or a class by its dotted name, as in ``torch.optim.SGD``.
        optimizer_args: further arguments of the optimizer; they win over what stands here, ``lr`` over learning_rate.
        learning_rate: peak.
        text_encoder_learning_rate: of the text encoder where it is trained, on the same schedule; null for that of the
            UNet.
        scale_lr: multiply it by the samples of a step, over all processes and their accumulation.
        lr_schedule: shape after the warm-up.
        lr_cycles: of cosine_restarts.
        lr_power: of polynomial.
        warmup_steps: linear warm-up.
        adam_beta2: second of the optimizer's betas; null takes its own (0.999 of AdamW's, 0.99 of Lion's).
        weight_decay: of optimizers that have one; null takes the optimizer's own (0.01 of AdamW's, 0 of Lion's).
        max_grad_norm: gradient clipping; 0 switches it off.
        max_bad_steps: stop after so many steps in a row whose loss or gradient is not finite. Such a step changes
            nothing, and the log names its samples. A step of fp16 whose gradient overflows lowers the loss scale; in a
            row with others it counts too.
        ema_decay: decay of the averaged weights that are saved; 0 saves the last weights.
        ema_device: where the average is kept; cpu spares the GPU a copy of the weights, for a transfer every step.
        flow: noise levels and weights of flow-matching models.
        snr_gamma: weigh timesteps by Min-SNR-γ (5 is usual); 0 weighs all alike.
        noise_offset: one more normal number per sample and channel in the noise, times this (0.05 to 0.1 is usual), so
            that the model learns very dark and very bright images.
        input_perturbation: noise on the noise that the model sees but is not asked for, times this (0.1 is usual).
        huber_c: ``c`` of the pseudo-Huber loss, ``2c(√(d² + c²) − c)`` of each difference d, which large differences
            count less in (0.1 is usual); 0 takes the squared error.
        masked_loss: let the error of each place count as the image is opaque there (its alpha channel), and that of
            transparent places nothing; an image without transparency counts everywhere.
        timesteps: how timesteps are drawn, of models that are no flow-matching ones.
        zero_terminal_snr: rescale the noise schedule to end in pure noise; needs a model that predicts v. With
            snr_gamma the last timestep, whose SNR is 0, weighs nothing.
        prediction_type: what the model is trained to predict; model keeps what it predicts already.
        caption_dropout: probability of training on the empty caption.
        tags: what is changed of captions that are lists of tags.
        clip_skip: the last layers of the text encoder that are left out, in training and of the saved model, as
            diffusers counts them: 1 is what other interfaces call 2. Of Stable Diffusion 1.x and 2.x.
        caption_chunks: how many sequences of the text encoder's length (77 tokens) a caption may fill; they are encoded
            one by one and stand side by side, as interfaces for drawing have it. Of Stable Diffusion 1.x and 2.x.
        random_words: words added to captions, so that none is a key to its image.
        lora: adapters to train in place of the weights; with train_text_encoder, the text encoder gets them too.
        train_text_encoder: train it along with the UNet.
        mixed_precision: autocast type; auto is bf16 on hardware that is fast in it (GPUs since Ampere, CPUs with AMX),
            else no.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        attention: how the UNet computes attention (``train.denoising.opening.attention.set_attention``).
        deterministic: use only algorithms that give the same bits each time; slower on GPUs, where a run that goes on
            otherwise has the same draws, order and samples, and weights that are equal but for rounding.
        tf32: let GPUs take products of float32 numbers in TF32, which is faster and rounds them to 10 bits.
        channels_last: keep the weights of the UNet's convolutions with their channels last; null does where that is
            faster, on GPUs in half precision.
        offload: keep the VAE and the text encoders on the CPU once all that they would encode is cached
            (``cache_latents``, ``cache_text``); validation takes them back for a while.
        compile: compile the UNet with torch.compile, once for all buckets; the first steps take minutes.
        resolution: side of the images in pixels; 0 is the model's own. With buckets, its square is their largest area.
        crop: how an image comes to its shape: ``none`` squashes it, ``center`` and ``random`` cut off what is too much.
        buckets: images of several shapes.
        caption_field: field of a sample's json that holds its caption; empty for the usual places, as in ``curate
            dedup``.
        missing_caption: what becomes of samples without a caption that can be read, as in ``curate dedup``: they are
            left out as ``unreadable``, or trained on with the ``empty`` one; ``auto`` leaves them out, unless no sample
            of the set has a caption.
        max_pixels: images with more pixels are left out, as in ``curate dedup``.
        weight_field: field of a sample's json that its loss is multiplied by; samples without it have weight 1.
        augmentation: random changes of the images.
        cache_latents: encode every image (and each of ``augmentation.variants``) once, at the start, and keep the
            latents in memory (``memory`` or true) or in ``cache`` (``disk``).
        cache_text: the same for the captions' embeddings, where the text encoder is not trained; in half precision.
        cache: folder of what is kept on disk, which several runs may share; empty is ``out/cache``.
        workers: processes that read and decode images.
        shuffle_shards: shards that are shuffled together.
        filter: which samples of a batch are left out.
        checkpoint_every: steps between checkpoints; 0 saves one only on a signal.
        keep_checkpoints: how many are kept; of a finished run the last one, from which more ``steps`` go on. 0 keeps
            one while it trains, and none afterwards.
        log_every: steps between lines of the log.
        save_dtype: of the weights in ``out/model``; float16 ones have half the size and are loaded with ``variant:
            fp16``.
        save_single_file: of Stable Diffusion 1.x and 2.x: write ``out/model.safetensors`` too, one file in the original
            layout, which WebUIs load.
        license: of the result, for its model card: an identifier that the hub knows.
        trackers: Accelerate's trackers by name (tensorboard, wandb, …), which get the log and the validation images.
        validation: images drawn at intervals.
        push_to_hub: repository that the finished model is uploaded to, as in ``name/model``; one that does not exist is
            made, private.
        seed: of the order, noise, timesteps, captions and augmentation.
    """

    model: str
    out: str
    shards: list[str | ShardGroup]
    revision: str | None = None
    variant: str | None = None
    model_config: str | None = None
    exclude: str = ""
    steps: int = 1000
    epochs: float = 0.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    auto_batch_size: bool = False
    optimizer: str = "adamw"
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-5
    text_encoder_learning_rate: float | None = None
    scale_lr: bool = False
    lr_schedule: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial"] = "constant"
    lr_cycles: int = 1
    lr_power: float = 1.0
    warmup_steps: int = 0
    adam_beta2: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float = 1.0
    max_bad_steps: int = 5
    ema_decay: float = 0.0
    ema_device: Literal["auto", "cpu"] = "auto"
    flow: Flow = field(default_factory=Flow)
    snr_gamma: float = 0.0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    huber_c: float = 0.0
    masked_loss: bool = False
    timesteps: Timesteps = field(default_factory=Timesteps)
    zero_terminal_snr: bool = False
    prediction_type: Literal["model", "epsilon", "v_prediction"] = "model"
    caption_dropout: float = 0.1
    tags: Tags = field(default_factory=Tags)
    clip_skip: int = 0
    caption_chunks: int = 1
    random_words: RandomWords = field(default_factory=RandomWords)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train_text_encoder: bool = False
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    attention: Literal["auto", "math", "sdpa", "xformers"] = "auto"
    deterministic: bool = False
    tf32: bool = True
    channels_last: bool | None = None
    offload: bool = False
    compile: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    resolution: int = 0
    crop: Literal["none", "center", "random"] = "center"
    buckets: Buckets = field(default_factory=Buckets)
    caption_field: str = ""
    missing_caption: Literal["auto", "unreadable", "empty"] = "auto"
    max_pixels: int = 64_000_000
    weight_field: str | None = None
    cache_latents: bool | Literal["memory", "disk"] = False
    cache_text: bool | Literal["memory", "disk"] = False
    cache: str = ""
    workers: int = 2
    shuffle_shards: int = 16
    filter: FilterConfig = field(default_factory=FilterConfig)
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 20
    save_dtype: Literal["float32", "float16"] = "float32"
    save_single_file: bool = False
    license: str = "unknown"
    trackers: list[str] = field(default_factory=list)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    push_to_hub: str = ""
    seed: int = 0
