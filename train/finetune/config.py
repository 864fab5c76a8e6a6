"""Settings of ``train finetune``: plain dataclasses, read from YAML and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from train.denoising.opening.config import LoRAConfig


@dataclass(frozen=True)
class ShardGroup:
    """Shards whose samples stand in an epoch several times, or count more or less than others.

    Args:
        path: a path, glob, brace range, folder or fsspec URL.
        repeats: how often each of their samples is seen in an epoch.
        weight: what their losses are multiplied by, beside ``weight_field``.
    """

    path: str
    repeats: int = 1
    weight: float = 1.0


@dataclass(frozen=True)
class Buckets:
    """Images of several shapes, of which a batch holds one: each goes where the aspect ratio is nearest to its own.

    Args:
        step: sides are multiples of it, in pixels. 0 brings every image to one square, as does one that is no smaller
            than the resolution.
        min_side: smallest side; 0 is half the resolution.
        max_side: largest side; 0 is twice the resolution.
    """

    step: int = 64
    min_side: int = 0
    max_side: int = 0


@dataclass(frozen=True)
class Tags:
    """Captions that are lists of tags, made other ones at every visit.

    Args:
        trigger: words in front of every caption that is not dropped.
        shuffle: bring the tags into another order.
        dropout: probability that a tag is left out, in [0, 1); one stays.
        keep: how many of the first tags are neither moved nor left out.
        separator: between tags.
    """

    trigger: str = ""
    shuffle: bool = False
    dropout: float = 0.0
    keep: int = 0
    separator: str = ","

    @property
    def active(self) -> bool:
        """Whether a caption is changed at all."""
        return bool(self.trigger or self.shuffle or self.dropout)


@dataclass(frozen=True)
class Timesteps:
    """How the timesteps that are trained on are drawn, among 1000.

    Args:
        kind: ``uniform``, or ``logit_normal``: the sigmoid of a normal number, most often in the middle (Esser et al.,
            ICML 2024, §3.1).
        mean: of that number; above 0 favours noisy timesteps.
        spread: its standard deviation.
        lowest: the least timestep.
        highest: the one after the greatest.
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    spread: float = 1.0
    lowest: int = 0
    highest: int = 1000


@dataclass(frozen=True)
class RandomWords:
    """Words that a caption gets at random places, other ones at every visit (Somepalli et al., NeurIPS 2023).

    Args:
        kind: word of the tokenizer's vocabulary, number, or repeat, a word of the caption again.
        number: how many; 0 leaves captions as they are. The paper adds 4.
        share: probability that a visit gets them.
    """

    kind: Literal["word", "number", "repeat"] = "word"
    number: int = 0
    share: float = 1.0


@dataclass(frozen=True)
class Flow:
    """How flow-matching models are trained; others do not look at it.

    Args:
        density: of the noise levels that are trained at: logit_normal, mode or uniform, before the schedule's shift.
        logit_mean: of logit_normal.
        logit_std: of logit_normal.
        mode_scale: of mode.
        weighting: of the loss by noise level: none, sigma_sqrt or cosmap.
        error_of: the velocity, or the sample that it stands for, whose error is σ² times as large.
        shift: of the noise levels, ``σ → s σ / (1 + (s − 1) σ)``, in training and in what is saved; 0 keeps the
            model's own.
    """

    density: Literal["logit_normal", "mode", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    error_of: Literal["velocity", "sample"] = "velocity"
    shift: float = 0.0


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes; zero switches one off.

    Args:
        shift: largest shift, as a share of the image's side.
        scale: largest relative change of size, in both directions.
        flip: probability of a horizontal flip.
        colour: largest change of brightness, contrast and saturation, relative.
        hue: largest rotation of hue, in turns.
        rotate: largest rotation, in degrees.
        variants: how many augmented forms of each image are made in all (their latents can then be cached);
            0 makes a new one at every visit.
    """

    shift: float = 0.0
    scale: float = 0.0
    flip: float = 0.0
    colour: float = 0.0
    hue: float = 0.0
    rotate: float = 0.0
    variants: int = 0

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return any((self.shift, self.scale, self.flip, self.colour, self.hue, self.rotate))


@dataclass(frozen=True)
class Calibration:
    """How the filter finds its thresholds by itself, from samples that are known to be unique.

    Args:
        steps: optimizer steps in which magnitudes are gathered and nothing is left out; 0 takes as many as give each
            threshold 40 magnitudes, and at least 50.
        quantile: of their magnitudes that becomes the threshold: one minus the share of unique samples left out. null
            takes the preset's, 0.8, or 0.9 where a policy is named.
        release: with ``evidence: window``, the quantile below which what was left out counts again.
        per_band: one threshold for each timestep band of 100; else one for all.
        window: steps after which an older magnitude counts by a factor e less; the threshold then follows the model to
            the end of the run. null takes twice ``steps``; 0 fixes the threshold after them.
        unique: folder of a curation of the shards that are trained on; its ledger tells which samples have no near
            copy. Empty takes all samples, which is right for shards that curation wrote.
    """

    steps: int = 0
    quantile: float | None = None
    release: float = 0.5
    per_band: bool = True
    window: int | None = None
    unique: str = ""


PRESETS = {
    "recommended": ("noisy_steps", "caption", "window"),
    "paper": ("every_step", "sample", "visit"),
    "none": ("off", "sample", "visit"),
}
"""What each of the filter's presets stands for: ``policy``, ``verdict_of`` and ``evidence``."""


@dataclass
class FilterConfig:
    """Which samples of a batch are left out because the model retrieves them from their caption.

    A preset is all that most runs need; who names a policy sets each of the others, too.

    Args:
        policy: ``off``; ``every_step`` judges each sample at each visit (Wen et al.); ``noisy_steps`` only where the
            timestep is at least ``min_timestep``; ``one_in_k`` at one of its visits in ``k``; ``noisy_one_in_k`` where
            both hold. Visits without a caption are never judged, nor left out. null takes the preset's.
        threshold: smallest text-conditional noise magnitude that is left out. null finds it in the run
            (``calibrate``), as it depends on the model, the set and the latents' size; else one number; or ten, one for
            each timestep band of 100, null where nothing is judged; or ``auto``, those that ``train detect
            --calibrate`` left in the model's folder; or a file of its or of a run's (``filter.json``).
        form: ``l2`` is the papers' scale (grows with the latent's size), ``rms`` is independent of it.
        min_timestep: of the noisy policies, in [0, 1000).
        k: of the policies one_in_k.
        expires: how many further visits a sample's last verdict stands for, where they are not judged themselves; 0
            leaves a sample out at the very visit only.
        verdict_of: whose last verdict stands in: the ``sample``'s own, or the latest one of any sample under the same
            ``caption``, whose visits it then holds for: copies that stand under one caption are judged by each other,
            as the magnitude is the caption's more than the image's. null is the preset's; ``sample`` beside a policy.
        evidence: what a verdict rests on: the magnitude of that ``visit`` alone; or those of all visits in the
            ``window`` of ``calibrate``, which it needs, each ranked among the unique samples', older ones counting
            less: visits of the sample, or of all samples under its caption (``verdict_of``). null takes the preset's;
            ``visit`` beside a policy.
        calibrate: how the thresholds are found in the run itself, where ``threshold`` is null.
        warmup_steps: steps before the filter starts.
        most_dropped: share of the visits from which on the run says that too many are left out, and what to change.
        preset: ``recommended`` is what docs/filter.md measures as the best: noisy_steps, by caption, over a window;
            ``paper`` is Wen et al.'s every_step, by visits; ``none`` trains without a filter.
    """

    policy: Literal["off", "every_step", "noisy_steps", "one_in_k", "noisy_one_in_k"] | None = None
    threshold: float | list[float | None] | str | None = None
    form: Literal["l2", "rms"] = "l2"
    min_timestep: int = 800
    k: int = 5
    expires: int = 8
    verdict_of: Literal["sample", "caption"] | None = None
    evidence: Literal["visit", "window"] | None = None
    calibrate: Calibration = field(default_factory=Calibration)
    warmup_steps: int = 0
    most_dropped: float = 0.3
    preset: Literal["recommended", "paper", "none"] = "recommended"

    def settled(self) -> FilterConfig:
        """The same with nothing left to the preset."""
        # Whoever names a policy means the plain form of the others.
        chosen: Any = (self.policy, "sample", "visit") if self.policy else PRESETS[self.preset]
        calibrate = self.calibrate
        if calibrate.quantile is None:
            calibrate = replace(calibrate, quantile=0.9 if self.policy else 0.8)
        verdict_of, evidence = self.verdict_of or chosen[1], self.evidence or chosen[2]
        return replace(self, policy=chosen[0], verdict_of=verdict_of, evidence=evidence, calibrate=calibrate)


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
            weight: w}``. A folder of images is imported into ``out/imported`` first, as by ``curate import``.
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
        timesteps: how timesteps are drawn, of models that are no flow-matching ones.
        zero_terminal_snr: rescale the noise schedule to end in pure noise; needs a model that predicts v. With
            snr_gamma the last timestep, whose SNR is 0, weighs nothing.
        prediction_type: what the model is trained to predict; model keeps what it predicts already.
        caption_dropout: probability of training on the empty caption.
        tags: what is changed of captions that are lists of tags.
        clip_skip: the last layers of the text encoder that are left out, in training and of the saved model, as
            diffusers counts them: 1 is what other interfaces call 2. Of Stable Diffusion 1.x and 2.x.
        random_words: words added to captions, so that none is a key to its image.
        lora: adapters to train in place of the weights; with train_text_encoder, the text encoder gets them too.
        train_text_encoder: train it along with the UNet.
        mixed_precision: autocast type; auto is bf16 on hardware that is fast in it (GPUs since Ampere, CPUs with AMX),
            else no.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        attention: how the UNet computes attention (``train.denoising.opening.attention.set_attention``).
        deterministic: use only algorithms that give the same bits each time; slower on GPUs, where a run that goes on
            otherwise has the same draws, order and samples, and weights that are equal but for rounding.
        compile: compile the UNet with torch.compile; the first steps take minutes.
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
    timesteps: Timesteps = field(default_factory=Timesteps)
    zero_terminal_snr: bool = False
    prediction_type: Literal["model", "epsilon", "v_prediction"] = "model"
    caption_dropout: float = 0.1
    tags: Tags = field(default_factory=Tags)
    clip_skip: int = 0
    random_words: RandomWords = field(default_factory=RandomWords)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train_text_encoder: bool = False
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    attention: Literal["auto", "math", "sdpa", "xformers"] = "auto"
    deterministic: bool = False
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
