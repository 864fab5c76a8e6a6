"""The families of models that are known here, as data: which pipelines are theirs, and which parts these have.

Nothing heavy is imported: a model is refused by its files before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

FAMILY_FILES = "train.denoising.families"
PIPELINES = "train.sampling.pipelines"


@dataclass(frozen=True)
class Family:
    """What is known of a family before one of its models is opened.

    Attributes:
        name: as people call it.
        pipeline: its text-to-image pipeline in diffusers, to which its models are bit-equal when nothing guides them.
        denoiser: its side of the protocol (``train/denoising/protocol.py``), ``module:class``.
        guided: its pipeline with guidance terms, ``module:class``.
        network: the part that denoises.
        encoders: text encoder → its tokenizer, in the order in which their outputs are joined.
        frozen: text encoders that are never trained.
        optional: parts that a model may do without.
        also: other pipeline classes with the same parts.
        files: what diffusers calls its single-file checkpoints.
        folders: what it calls those that have to be made a folder of first, since they lack encoders or tokenizers.
        prefixes: part → how its weights' names begin in a single file of the original layout.
        added: how the network is conditioned on more than the caption (``addition_embed_type`` of a UNet).
        flow: whether it is trained by flow matching, and its schedulers are.
        options: of loading: parts to leave out, and switches.
    """

    name: str
    pipeline: str
    denoiser: str
    guided: str
    network: str = "unet"
    encoders: Mapping[str, str] = field(default_factory=lambda: {"text_encoder": "tokenizer"})
    frozen: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    prefixes: Mapping[str, str] = field(default_factory=dict)
    added: str | None = None
    flow: bool = False
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def weighted(self) -> tuple[str, ...]:
        """The parts that have weights."""
        return (self.network, "vae", *self.encoders)

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders of a model."""
        return (*self.weighted, *self.encoders.values(), "scheduler")


STABLE_DIFFUSION = Family(
    name="Stable Diffusion 1.x and 2.x",
    pipeline="StableDiffusionPipeline",
    denoiser=f"{FAMILY_FILES}.stable_diffusion:StableDiffusionDenoiser",
    guided=f"{PIPELINES}.stable_diffusion:GuidedStableDiffusion",
    also=("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "GuidedStableDiffusion"),
    files=("v1", "v2"),
    prefixes={"UNet": "model.diffusion_model.", "VAE": "first_stage_model.", "text encoder": "cond_stage_model."},
    options={"safety_checker": None, "requires_safety_checker": False},
)
XL = Family(
    name="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    denoiser=f"{FAMILY_FILES}.stable_diffusion_xl:StableDiffusionXLDenoiser",
    guided=f"{PIPELINES}.stable_diffusion_xl:GuidedStableDiffusionXL",
    encoders={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    also=("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", "GuidedStableDiffusionXL"),
    files=("xl_base",),
    prefixes={
        "UNet": "model.diffusion_model.",
        "VAE": "first_stage_model.",
        "text encoder": "conditioner.embedders.0.",
        "second text encoder": "conditioner.embedders.1.",
    },
    added="text_time",
    options={"add_watermarker": False},
)
SD3 = Family(
    name="Stable Diffusion 3 and 3.5",
    pipeline="StableDiffusion3Pipeline",
    denoiser=f"{FAMILY_FILES}.stable_diffusion_3:StableDiffusion3Denoiser",
    guided=f"{PIPELINES}.stable_diffusion_3:GuidedStableDiffusion3",
    network="transformer",
    encoders={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"},
    frozen=("text_encoder_3",),
    optional=("text_encoder_3", "tokenizer_3"),
    also=("GuidedStableDiffusion3",),
    folders=("sd3", "sd35_large", "sd35_medium"),
    flow=True,
)
FLUX = Family(
    name="FLUX.1",
    pipeline="FluxPipeline",
    denoiser=f"{FAMILY_FILES}.flux:FluxDenoiser",
    guided=f"{PIPELINES}.flux:GuidedFlux",
    network="transformer",
    encoders={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    frozen=("text_encoder_2",),
    also=("GuidedFlux",),
    folders=("flux-dev", "flux-schnell"),
    flow=True,
)
Z_IMAGE = Family(
    name="Z-Image",
    pipeline="ZImagePipeline",
    denoiser=f"{FAMILY_FILES}.z_image:ZImageDenoiser",
    guided=f"{PIPELINES}.z_image:GuidedZImage",
    network="transformer",
    frozen=("text_encoder",),
    also=("ZImageImg2ImgPipeline", "ZImageInpaintPipeline", "GuidedZImage"),
    folders=("z-image-turbo",),
    flow=True,
)
FAMILIES = (STABLE_DIFFUSION, XL, SD3, FLUX, Z_IMAGE)
ENCODERS = tuple(dict.fromkeys(name for family in FAMILIES for name in family.encoders))
"""What pipelines call their text encoders, in order."""


def family_of(names: Iterable[str]) -> Family | None:
    """The family of a pipeline, by the names of its class and of those that it is derived from; None of any other."""
    known = {name: family for family in FAMILIES for name in (family.pipeline, *family.also)}
    return next((known[name] for name in names if name in known), None)


def supported() -> str:
    """The families that are had, for messages."""
    *some, last = (family.name for family in FAMILIES)
    names = f"{', '.join(some)} and {last}" if some else last
    return f"{names} (text to image, latents alone into the network) can be used here"
