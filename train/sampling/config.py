"""Settings of sampling: ``AMGConfig`` for the guidance, ``SampleConfig`` for the job. Plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

# What differs between the presets. ``main`` has the constants of the authors' released Stable Diffusion
# sampler. The paper gives no numbers for its strong version, only its aim (nothing above .4 rather than .5)
# and its means (more guidance): here the dissimilarity term is doubled and everything starts 0.1 earlier.
PRESETS = {
    "main": {"lambda_a": 0.3, "lambda_b": 0.4, "sim_offset": 0.3, "gain": 1.0},
    "strong": {"lambda_a": 0.2, "lambda_b": 0.3, "sim_offset": 0.2, "gain": 2.0},
}
# c_3 of each form of the dissimilarity term, for raw and for normalised gradients. Only the first is
# published.
C_3 = {
    ("released", False): 100.0,
    ("paper", False): 400.0,
    ("excess", False): 2000.0,
    ("paper", True): 0.5,
    ("excess", True): 2.0,
}


@dataclass
class AMGConfig:
    """Anti-memorization guidance; similarities are on SSCD's scale (unrelated near 0, copies above 0.5).

    Args:
        preset: where the values left at None come from.
        despecification: use G_spe, which lowers the guidance scale.
        deduplication: use G_dup, which steers away from the nearest training sample's caption.
        dissimilarity: use G_sim, which steers down the gradient of the similarity.
        schedule: form of the threshold λ_t above which an image is guided.
        lambda_a: λ at t = 1000 (exponential: its limit for large t).
        lambda_b: λ at t = 0, and the constant schedule's value (−1: guide always).
        lambda_c: rate of the exponential.
        c_1: strength of G_spe per similarity.
        c_2: strength of G_dup per similarity; None is the released form, all that G_spe left once similarity
            is 0.3.
        c_3: strength of G_sim; None is the form's own.
        floor: guidance scale that G_spe and G_dup together leave at least (paper: 1; 0 drops the prompt,
            below 0 opposes it).
        sim_form: factor of ∇σ. released: c_3 (σ − sim_offset) exp((1000 − t)/170); paper: c_3 √(1 − ᾱ_t);
            excess: c_3 (σ − λ_t) √(1 − ᾱ_t), which starts from nothing at the threshold.
        sim_offset: the released form's offset.
        normalise: take ∇σ/‖∇σ‖ · ‖ε̂‖ for ∇σ, so that c_3 is a share of the noise prediction (sim_form paper,
            excess).
        edits: average ∇σ over this many random edits (shift, crop, colour) beside the image itself, so that
            the image has to change and not only its score.
        through_unet: let the gradient run through the denoiser too (slow, and more memory).
        t_range: timesteps, of 1000, at which images are watched and guided.
        sim_t_range: timesteps at which G_sim acts.
        every: watch images that are not being guided at each k-th step only.
        neighbours: nearest training samples among which G_dup looks for a frequent caption.
        min_count: a caption is frequent that occurs more often than this in the training set.
        decode_slice: images decoded at a time (bounds memory).
        seed: of the random edits.
    """

    preset: Literal["main", "strong"] = "main"
    despecification: bool = True
    deduplication: bool = True
    dissimilarity: bool = True
    schedule: Literal["exponential", "parabolic", "constant"] = "exponential"
    lambda_a: float | None = None
    lambda_b: float | None = None
    lambda_c: float = 0.005
    c_1: float = 13.0
    c_2: float | None = None
    c_3: float | None = None
    floor: float = 1.0
    sim_form: Literal["released", "paper", "excess"] = "released"
    sim_offset: float | None = None
    normalise: bool = False
    edits: int = 0
    through_unet: bool = False
    t_range: tuple[float, float] = (0.0, 1000.0)
    sim_t_range: tuple[float, float] = (0.0, 1000.0)
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
        for option, known in (
            ("preset", tuple(PRESETS)),
            ("schedule", ("exponential", "parabolic", "constant")),
            ("sim_form", ("released", "paper", "excess")),
        ):
            if getattr(self, option) not in known:
                raise ValueError(f"amg.{option} is {getattr(self, option)!r}: choose one of {', '.join(known)}")
        if self.normalise and self.sim_form == "released":
            raise ValueError("amg.normalise needs amg.sim_form paper or excess: released is a factor for raw gradients")
        for option, least in (
            ("every", 1),
            ("neighbours", 1),
            ("decode_slice", 1),
            ("edits", 0),
            ("min_count", 0),
        ):
            if getattr(self, option) < least:
                raise ValueError(f"amg.{option} is {getattr(self, option)}: it is at least {least}")
        for option in ("t_range", "sim_t_range"):
            low, high = getattr(self, option)
            if not low <= high:
                raise ValueError(f"amg.{option} is {low} to {high}: the lower timestep comes first")
        preset = PRESETS[self.preset]
        filled: dict[str, Any] = {
            name: preset[name] for name in ("lambda_a", "lambda_b", "sim_offset") if getattr(self, name) is None
        }
        if self.c_3 is None:
            filled["c_3"] = preset["gain"] * C_3[self.sim_form, self.normalise]
        return replace(self, **filled)


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
        guidance: none, amg, or amg-strong (AMG's stronger preset).
        amg: AMG's settings.
        index: training-set index: the output folder of curate dedup, or its index folder.
        embedder: image embedder; empty takes the one that the index was built with.
        seeds: images per prompt; their seeds are counted from the prompt's own, or from first_seed.
        first_seed: seed of each prompt's first image.
        steps: denoising steps.
        scale: classifier-free guidance scale.
        scheduler: a diffusers scheduler class, as in DPMSolverMultistepScheduler; empty keeps the model's.
        negative_prompt: what not to draw.
        neurons: file of ``train localize``, whose neurons are blocked while images are drawn; empty blocks none.
        neurons_of: all of the file's neurons for every prompt, or each prompt's own only (its images are then not
            batched with another's).
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
    guidance: Literal["none", "amg", "amg-strong"] = "none"
    amg: AMGConfig = field(default_factory=AMGConfig)
    index: str = ""
    embedder: str = ""
    seeds: int = 4
    first_seed: int = 0
    steps: int = 50
    scale: float = 7.5
    scheduler: str = ""
    negative_prompt: str = ""
    neurons: str = ""
    neurons_of: Literal["all", "own"] = "all"
    height: int = 0
    width: int = 0
    batch_size: int = 8
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"
