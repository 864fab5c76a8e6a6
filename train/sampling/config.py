"""Settings of sampling: one plain dataclass a guidance term, and ``SampleConfig`` for the job."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from afresh.errors import UsageError
from train.sampling.presets.config import C_3, DEFAULT, DEFAULTS, PRESETS


@dataclass
class AMGConfig:
    """Anti-memorization guidance; similarities are on SSCD's scale (unrelated near 0, copies above 0.5), or, of
    pixels, minus a normalised L2 distance (unrelated near −2, copies above −1.4).

    Args:
        preset: where the values left at None come from: main and strong are published, early and views are ours, pixels
            is for pixels.
        despecification: use G_spe, which lowers the guidance scale.
        deduplication: use G_dup, which steers away from the nearest training sample's caption.
        dissimilarity: use G_sim, which steers down the gradient of the similarity.
        schedule: form of the threshold λ_t above which an image is guided.
        lambda_a: λ at t = 1000 (exponential: its limit for large t).
        lambda_b: λ at t = 0, and the constant schedule's value (−1: guide always).
        lambda_c: rate of the exponential.
        c_1: strength of G_spe per similarity.
        c_1_at: guidance scale that c_1 is stated for: at others it is in proportion. None takes c_1 as it is, as
            released, which at a lower scale leaves less of the prompt.
        c_2: strength of G_dup per similarity; None is the released form, all that G_spe left once similarity
            is 0.3.
        c_3: strength of G_sim; None is the form's own.
        floor: guidance scale that G_spe and G_dup together leave at least (paper: 1; 0 drops the prompt,
            below 0 opposes it).
        escalate: how far the floor falls in 1000 timesteps in which an image that is guided stays above λ_t, so that
            one that needs little loses little.
        least_floor: how far it falls at most.
        sim_form: factor of ∇σ. released: c_3 (σ − sim_offset) exp((1000 − t)/170); paper: c_3 √(1 − ᾱ_t);
            excess: c_3 (σ − λ_t) √(1 − ᾱ_t), which starts from nothing at the threshold.
        sim_offset: the released form's offset.
        normalise: take ∇σ/‖∇σ‖ · ‖ε̂‖ for ∇σ, so that c_3 is a share of the noise prediction (sim_form paper,
            excess).
        edits: average ∇σ over this many random edits (shift, crop, colour) beside the image itself, so that
            the image has to change and not only its score.
        through_unet: let the gradient run through the denoiser too (slow, and more memory).
        decoder: what images are watched and steered through: full is the VAE's own, linear a convolution that is
            fitted to it and costs next to nothing.
        views: watch and steer by the highest similarity of the index and its views (docs/sampling.md), not by the
            index's embedder alone.
        restarts: of ``train sample``: how often an image that is a copy by some view when it is finished (above 0.5) is
            drawn again, from another seed and under stronger guidance; the farthest of its drawings is kept.
        guided_limit: of restarts: the similarity above which one that was guided is drawn again; None is that of a
            copy for these, too.
        release: an image that is guided is let go only when σ falls below λ_t less this.
        t_range: timesteps, of 1000, at which images are watched and guided.
        sim_t_range: timesteps at which G_sim acts.
        every: watch images that are not being guided at each k-th step only.
        neighbours: nearest training samples among which G_dup looks for a frequent caption.
        min_count: a caption is frequent that occurs more often than this in the training set.
        decode_slice: images decoded at a time (bounds memory).
        seed: of the random edits.
    """

    preset: Literal["main", "strong", "early", "views", "pixels"] = "main"
    despecification: bool = True
    deduplication: bool = True
    dissimilarity: bool = True
    schedule: Literal["exponential", "parabolic", "constant"] = "exponential"
    lambda_a: float | None = None
    lambda_b: float | None = None
    lambda_c: float | None = None
    c_1: float = 13.0
    c_1_at: float | None = None
    c_2: float | None = None
    c_3: float | None = None
    floor: float | None = None
    escalate: float | None = None
    least_floor: float = -2.0
    sim_form: Literal["released", "paper", "excess"] | None = None
    sim_offset: float | None = None
    normalise: bool | None = None
    edits: int = 0
    through_unet: bool | None = None
    decoder: Literal["full", "linear"] | None = None
    views: bool | None = None
    restarts: int | None = None
    guided_limit: float | None = None
    release: float | None = None
    t_range: tuple[float, float] | None = None
    sim_t_range: tuple[float, float] | None = None
    every: int = 1
    neighbours: int = 50
    min_count: int = 20
    decode_slice: int = 8
    seed: int = 0

    def resolved(self) -> AMGConfig:
        """The same with every None that a preset fills in filled in, checked.

        Raises:
            ValueError: names the option and the values it takes.
        """
        _choice("amg.preset", self.preset, tuple(PRESETS))
        preset = {**DEFAULTS, **PRESETS[self.preset]}
        if self.c_1_at is not None and not self.c_1_at > 0:
            raise ValueError(f"amg.c_1_at is {self.c_1_at}: it is above 0")
        if self.normalise is None and self.sim_form == "released":
            preset["normalise"] = False
        filled = {name: preset[name] for name in preset if name != "gain" and getattr(self, name) is None}
        config = replace(self, **filled)
        _choice("amg.schedule", config.schedule, ("exponential", "parabolic", "constant"))
        _choice("amg.sim_form", config.sim_form, ("released", "paper", "excess"))
        _choice("amg.decoder", config.decoder, ("full", "linear"))
        if config.normalise and config.sim_form == "released":
            raise ValueError("amg.normalise needs amg.sim_form paper or excess: released is a factor for raw gradients")
        least = {"edits": 0, "min_count": 0, "release": 0, "escalate": 0, "restarts": 0}
        _least("amg", config, every=1, neighbours=1, decode_slice=1, **least)
        for option in ("t_range", "sim_t_range"):
            low, high = getattr(config, option)
            if not low <= high:
                raise ValueError(f"amg.{option} is {low} to {high}: the lower timestep comes first")
        if config.c_3 is None:
            config = replace(config, c_3=preset["gain"] * C_3[str(config.sim_form), bool(config.normalise)])
        return config


def _choice(option: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} is {value!r}: choose one of {', '.join(known)}")


@dataclass
class PromptConfig:
    """Prompt-embedding minimisation (Wen et al., ICLR 2024).

    Args:
        target: ``l_target``, the magnitude at which an image stops. The paper sweeps 1 to 5; the released code's 3 for
            four images together is 1.5 an image. auto is the first step's threshold that ``train detect --calibrate``
            left with the model.
        form: of the magnitude: l2, the paper's, or rms, which does not depend on the size of the latents.
        steps: the most steps.
        lr: of AdamW.
        slice: images whose gradients are computed at a time (bounds memory).
    """

    target: float | Literal["auto"] = 1.5
    form: Literal["l2", "rms"] = "l2"
    steps: int = 10
    lr: float = 0.05
    slice: int = 8

    def check(self) -> None:
        """Raise ValueError for values that make no sense."""
        _least("prompt", self, target=0, steps=0, lr=0, slice=1)


@dataclass
class AnisotropyConfig:
    """Anisotropy minimisation (Asthana and Belagiannis, ICLR 2026).

    Args:
        target: anisotropy at which an image stops, on the scale of the signal: that of 64 × 64 latents.
        cosine_weight: of the angle at low noise (released: 2 for Stable Diffusion 1.4, 0.1 for 2).
        magnitude_weight: of the magnitude at high noise.
        steps: the most steps.
        lr: of AdamW.
        slice: images whose gradients are computed at a time (bounds memory).
    """

    target: float = 1.5
    cosine_weight: float = 2.0
    magnitude_weight: float = 1.0
    steps: int = 10
    lr: float = 0.05
    slice: int = 8

    def check(self) -> None:
        """Raise ValueError for values that make no sense."""
        _least("anisotropy", self, cosine_weight=0, magnitude_weight=0, steps=0, lr=0, slice=1)


@dataclass
class AttentionConfig:
    """Attention masking (Ren et al., ECCV 2024).

    Args:
        beginning: factor on the beginning token's logits; 1 leaves them.
        mask_end: mask the end token too, not only what follows it.
    """

    beginning: float = 1.25
    mask_end: bool = False

    def check(self) -> None:
        """Raise ValueError for values that make no sense."""
        _least("attention", self, beginning=0)


@dataclass
class BasinConfig:
    """Guidance begins at a transition point (Jain et al., CVPR 2025).

    Args:
        before: guidance scale before it: 0 without the prompt, 1 with the prompt but unguided, below 0 opposite.
        until: a static transition point: the timestep, of 1000, at which guidance begins; null finds the dynamic one.
        least: images whose first magnitude is below this are left alone from the start; 0 leaves none alone. auto is
            the first step's threshold that ``train detect --calibrate`` left with the model.
        form: of that magnitude: l2 or rms.
    """

    before: float = 0.0
    until: float | None = None
    least: float | Literal["auto"] = 0.0
    form: Literal["l2", "rms"] = "l2"

    def check(self) -> None:
        """Raise ValueError for values that make no sense."""
        _least("basin", self, least=0)


@dataclass
class NoiseConfig:
    """Initial-noise adjustment (Han et al., NeurIPS 2025); the defaults are those of the released code.

    Args:
        method: sample, by gradients, or batch, without.
        target: sample: the magnitude at which an image stops; auto is the first step's threshold that ``train detect
            --calibrate`` left with the model.
        form: of the magnitude: l2, the paper's, or rms, which does not depend on the size of the latents.
        steps: sample: the most steps.
        lr: sample: of AdamW.
        rho: batch: length of the step along which the direction is compared.
        gamma: batch: strength of an iteration.
        iterations: batch: how many.
        delay: batch: denoising steps without guidance afterwards.
        slice: images computed at a time (bounds memory).
    """

    method: Literal["sample", "batch"] = "sample"
    target: float | Literal["auto"] = 0.9
    form: Literal["l2", "rms"] = "l2"
    steps: int = 10
    lr: float = 0.01
    rho: float = 50.0
    gamma: float = 0.7
    iterations: int = 2
    delay: int = 5
    slice: int = 8

    def check(self) -> None:
        """Raise ValueError for values that make no sense."""
        _choice("noise.method", self.method, ("sample", "batch"))
        _least("noise", self, target=0, steps=0, lr=0, rho=0, iterations=0, delay=0, slice=1)


@dataclass
class TokensConfig:
    """Random words in the prompt (Somepalli et al., NeurIPS 2023).

    Args:
        kind: word of the vocabulary, number, or repeat, a word of the prompt again.
        number: how many.
    """

    kind: Literal["word", "number", "repeat"] = "word"
    number: int = 4

    def check(self) -> None:
        """Raise ValueError for values that make no sense."""
        _choice("tokens.kind", self.kind, ("word", "number", "repeat"))
        _least("tokens", self, number=0)


@dataclass
class RejectionConfig:
    """Draw again what comes too close to a training image.

    Args:
        limit: similarity above which an image is drawn again; null is that of a copy (0.5, or −1.4 of pixels).
        tries: drawings of an image at most, the first included.
    """

    limit: float | None = None
    tries: int = 5

    def check(self) -> None:
        """Raise ValueError for values that make no sense."""
        _least("rejection", self, tries=1)


Settings = TypeVar(
    "Settings", PromptConfig, AnisotropyConfig, AttentionConfig, BasinConfig, NoiseConfig, TokensConfig, RejectionConfig
)


def configured(kind: type[Settings], config: Settings | None, overrides: dict[str, Any]) -> Settings:
    """``config``, or the defaults, with ``overrides``, checked.

    Raises:
        UsageError: names the option and the values it takes.
    """
    try:
        chosen = replace(config if config is not None else kind(), **overrides)
        if hasattr(chosen, "form"):
            _choice(f"{kind.__name__}.form", chosen.form, ("l2", "rms"))
        chosen.check()
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return chosen


def _least(term: str, config: object, **least: float) -> None:
    for option, bound in least.items():
        value = getattr(config, option)
        if value != "auto" and not value >= bound:
            raise ValueError(f"{term}.{option} is {value}: it is at least {bound}")


def number(option: str, value: float | str) -> float:
    """A setting that ``train sample`` may find by itself, once it is known.

    Raises:
        UsageError: it is still ``auto``.
    """
    if isinstance(value, str):
        raise UsageError(f"{option} is {value}, which train sample reads from a calibrated model: give a number here")
    return value


@dataclass
class SampleConfig:
    """Draw images for prompts, with or without guidance.

    Args:
        model: Stable Diffusion: a diffusers directory, a hub name or a checkpoint file (.safetensors).
        revision: branch, tag or commit of a hub name.
        variant: of the weight files, as in model.fp16.safetensors; null takes those without one.
        model_config: of a checkpoint file: a diffusers directory of its architecture, for the configs, tokenizer and
            scheduler that a single file lacks; null asks the hub.
        lora: adapters to add to the weights: a folder, a .safetensors file or a hub name; null adds none.
        prompts: prompt file (.txt, .jsonl, .csv, .parquet).
        out: folder to write; images that it already holds are kept.
        guidance: none; amg (by several views); amg-released, amg-paper, amg-strong or amg-early (by the index's
            embedder alone); prompt (embedding minimisation); anisotropy (the
            same, of the anisotropy); attention (cross-attention masking); basin (guidance from the dynamic transition
            point) or opposite (the same, with opposite guidance before it); noise or
            noise-batch (initial-noise adjustment, per sample or batch-wise); tokens or numbers (random words or numbers
            in the prompt); rejection (draw copies again); module:Class (a term of your own, docs/library.md). Several
            joined by + act in that order.
        amg: AMG's settings.
        prompt: of prompt.
        anisotropy: of anisotropy.
        attention: of attention.
        basin: of basin and opposite.
        noise: of noise and noise-batch.
        tokens: of tokens and numbers.
        rejection: of rejection.
        compare: guidances by the names above, in the place of guidance: they draw the same prompts from the same seeds,
            each into a folder of its own below out, beside a picture, a table and a summary of all.
        never_above: similarity to the nearest training image above which no image is written: such a one is drawn again
            from another seed and with stronger guidance, and in the end withheld; null writes all. Needs index.
        tries: of never_above: drawings of an image at most, the first included.
        index: training-set index: the output folder of curate dedup, or its index folder.
        embedder: image embedder; empty takes the one that the index was built with.
        views: look at images through the views of the index too: a second embedder, luminance, edges, colour. They are
            made beside the shards of the index when they are first asked for; false goes by its embedder alone.
        judge_index: of never_above: a second index, of another embedder, by which no image may be above it either.
        seeds: images per prompt; their seeds are counted from the prompt's own, or from first_seed.
        first_seed: seed of each prompt's first image.
        steps: denoising steps.
        scale: classifier-free guidance scale.
        scheduler: a diffusers scheduler class, as in DPMSolverMultistepScheduler; empty keeps the model's.
        negative_prompt: what not to draw.
        neurons: file of ``train localize``, whose neurons are blocked while images are drawn; empty blocks none.
        neurons_of: all of the file's neurons for every prompt, or each prompt's own only (its images are then not
            batched with another's); known takes a prompt's own where the file has some, and else none.
        height: in pixels; 0 is the model's own.
        width: in pixels; 0 is the model's own.
        batch_size: images drawn together.
        dtype: of the model's weights.
        device: auto, cpu, cuda, …
    """

    model: str
    prompts: str
    out: str
    revision: str | None = None
    variant: str | None = None
    model_config: str | None = None
    lora: str | None = None
    guidance: str = "none"
    amg: AMGConfig = field(default_factory=lambda: AMGConfig(preset=DEFAULT))
    prompt: PromptConfig = field(default_factory=PromptConfig)
    anisotropy: AnisotropyConfig = field(default_factory=AnisotropyConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    basin: BasinConfig = field(default_factory=BasinConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    compare: list[str] = field(default_factory=list)
    never_above: float | None = None
    tries: int = 5
    index: str = ""
    embedder: str = ""
    views: bool = True
    judge_index: str = ""
    seeds: int = 4
    first_seed: int = 0
    steps: int = 50
    scale: float = 7.5
    scheduler: str = ""
    negative_prompt: str = ""
    neurons: str = ""
    neurons_of: Literal["all", "own", "known"] = "all"
    height: int = 0
    width: int = 0
    batch_size: int = 8
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"
