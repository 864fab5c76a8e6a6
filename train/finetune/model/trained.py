"""What is trained: a model's parts, which of their weights change, and how the result is saved."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afresh.errors import UsageError
from afresh.files import full_disk_named
from train.denoising.conditioning import Conditioning
from train.denoising.families.registry import denoiser_of, pipeline_family
from train.denoising.kinds import STABLE_DIFFUSION
from train.denoising.network import network_of
from train.denoising.opening.adapters import add_lora, parts_of, save_lora, text_encoders
from train.denoising.opening.loading import check_trainable, load_pipeline
from train.denoising.opening.original import save_single_file
from train.denoising.opening.saving import save_pipeline
from train.finetune.config import FinetuneConfig
from train.finetune.model.speed import wants_channels_last

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Model:
    """A pipeline while it is trained.

    Attributes:
        pipe: the pipeline that the parts belong to.
        denoiser: network and text encoders as one module; the optimizer and the data-parallel wrapper go around it.
        size: side of the training images in pixels.
        device: that it trains on.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        denoiser: Any,
        device: torch.device,
        fused: Callable[[str], StableDiffusionPipeline] | None = None,
    ) -> None:
        self.pipe, self.denoiser = pipe, denoiser
        self._fused = fused
        self._trained_names = {name for name, p in denoiser.named_parameters() if p.requires_grad}
        self.size = denoiser.side
        self.device = device
        self._empty: Conditioning | None = None
        self._offloaded: list[torch.nn.Module] = []

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that change, always in the same order."""
        return [p for p in self.denoiser.parameters() if p.requires_grad]

    @torch.no_grad()
    def predict_unconditional(self, x_t: Tensor, t: Tensor, frames: Tensor | None = None) -> Tensor:
        """The model's output under the empty caption: like ``x_t``, float32; of images with these ``frames [n, 6]``.

        Outside the data-parallel wrapper and without gradients: processes need not agree on whether they call it.
        """
        empty = self._empty_caption()
        empty = empty if frames is None else self.denoiser.framed(empty, frames)
        return self.denoiser(x_t, t, empty).float()

    def _empty_caption(self) -> Conditioning:
        """Encoded once, unless the text encoder changes."""
        if self._empty is None:
            tokens = self.denoiser.tokens([""]).to(self.device)
            encoders = self.denoiser.encoders.values()
            trained = any(p.requires_grad for encoder in encoders for p in encoder.parameters())
            self._empty = tokens if trained else self.denoiser.encoded(tokens)
        return self._empty

    @torch.no_grad()
    def offload(self) -> None:
        """Put the VAE and the text encoders on the CPU: all that they would encode is cached."""
        self._empty_caption()
        self._offloaded = [self.pipe.vae, *self.denoiser.encoders.values()]
        for part in self._offloaded:
            part.to("cpu")

    @contextlib.contextmanager
    def brought_back(self) -> Iterator[None]:
        """What is offloaded is on the device while the block runs."""
        for part in self._offloaded:
            part.to(self.device)
        try:
            yield
        finally:
            for part in self._offloaded:
                part.to("cpu")

    @torch.no_grad()
    def encoders_to_cpu(self) -> None:
        """Keep the text encoders' weights in main memory from now on, all captions being cached: nothing encodes again.

        Buffers stay, which the data-parallel wrapper compares between the devices.
        """
        self._empty = self.denoiser.encoded(self.denoiser.tokens([""]).to(self.device))
        for encoder in self.denoiser.encoders.values():
            for parameter in encoder.parameters():
                parameter.data = parameter.data.cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that change, by name."""
        return {k: v for k, v in self.denoiser.state_dict().items() if k in self._trained_names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.denoiser.load_state_dict(state, strict=False)

    def save(self, folder: Path, *, half: bool = False, single_file: bool = False) -> None:
        """Write the pipeline aside and rename it, so that a model folder is never half a model.

        Adapters go to the folder ``lora`` beside it first; the pipeline is the base as it was, in full precision, with
        them added. The denoiser cannot be used any more after that.

        Args:
            folder: of the pipeline.
            half: save float16 weights, as the variant ``fp16``.
            single_file: write ``folder.safetensors`` too, in the layout that WebUIs load.

        Raises:
            UserError: the disk is full, or the layout has no place for a layer.
        """
        with full_disk_named(folder):
            self._save(folder, half, single_file)

    def _save(self, folder: Path, half: bool, single_file: bool) -> None:
        pipe = self.pipe
        self.denoiser.eval()
        if self._fused is None:
            network_of(pipe).to(memory_format=torch.contiguous_format)
        for name in parts_of(pipe):
            setattr(pipe, name, getattr(self.denoiser, name))
        if self._fused is not None:
            adapters = folder.with_name("lora")
            save_lora(pipe, adapters)
            for module in self.denoiser.modules():  # lets go of the memory that the base needs now
                for name, _ in list(module.named_parameters(recurse=False)):
                    setattr(module, name, None)
            pipe = self._fused(str(adapters))
            pipe.scheduler = self.pipe.scheduler  # which training may have changed
        aside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        if single_file:
            save_single_file(pipe, folder.with_name(folder.name + ".safetensors"), half=half)
        save_pipeline(pipe, aside, half=half)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def without_layers(pipe: StableDiffusionPipeline, n: int) -> StableDiffusionPipeline:
    """The pipeline, whose text encoder lacks its last ``n`` layers: what others do by ``clip_skip`` at each use.

    Raises:
        UsageError: it has no more layers than that.
    """
    if not n or pipeline_family(pipe) is not STABLE_DIFFUSION:  # which is refused
        return pipe
    # Some releases of transformers have the layers a level deeper.
    encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder
    if n >= len(encoder.layers):
        raise UsageError(f"clip_skip {n}: the text encoder has {len(encoder.layers)} layers")
    encoder.layers = encoder.layers[:-n]
    pipe.text_encoder.config.num_hidden_layers -= n
    return pipe


def check_options(pipe: Any, config: FinetuneConfig) -> None:
    """Refuse options that a model's family does not have.

    Raises:
        UsageError: one of them is set; says why.
    """
    if (family := pipeline_family(pipe)) is STABLE_DIFFUSION:
        return
    for name, why in (
        ("save_single_file", "that layout is written of Stable Diffusion 1.x and 2.x alone"),
        ("clip_skip", "its text encoders are not read at their last layers"),
        ("caption_chunks", "its text encoders' pooled output is of one sequence"),
    ):
        if getattr(config, name) != getattr(FinetuneConfig, name):
            raise UsageError(f"{name}: not for {family.name}: {why}; leave it out")
    if config.train_text_encoder and set(family.encoders) <= set(family.frozen):
        why = "is a language model, which is never trained; leave it out"
        raise UsageError(f"train_text_encoder: {family.name}'s {why}")


def load_model(config: FinetuneConfig, device: torch.device, *, spread: bool = False) -> Model:
    """Load the pipeline, set free the weights that are to be trained, and freeze the others.

    The VAE goes to the device; the denoiser goes there with ``accelerator.prepare``.

    Args:
        config: of the run.
        device: that it trains on.
        spread: the weights are to be spread over processes, which takes them in no other order than their own.

    Raises:
        UserError: the model cannot be read, is of another kind, or predicts something else than ε or v.
    """
    opened: Any = functools.partial(
        load_pipeline,
        config.model,
        attention=config.attention,
        revision=config.revision,
        variant=config.variant,
        model_config=config.model_config,
    )

    def load(**options: Any) -> StableDiffusionPipeline:
        return without_layers(opened(**options), config.clip_skip)

    pipe = load()
    check_trainable(pipe, config.model)
    check_options(pipe, config)
    pipe.vae.to(device).requires_grad_(False)
    if wants_channels_last(config, device) and not spread:
        network_of(pipe).to(memory_format=torch.channels_last)
    if config.lora.rank:
        # What is frozen needs no more than the precision that it is computed in.
        base = HALF.get(config.mixed_precision, torch.float32)
        add_lora(pipe, config.lora, text_encoder=config.train_text_encoder, base=base, seed=config.seed)
    else:
        network_of(pipe).requires_grad_(True)
        for encoder in text_encoders(pipe).values():
            encoder.requires_grad_(config.train_text_encoder)
    if config.gradient_checkpointing:
        network_of(pipe).enable_gradient_checkpointing()
    denoiser: Any = denoiser_of(pipe)
    denoiser.leave_unused_alone()
    if config.caption_chunks > 1:
        denoiser.chunks = config.caption_chunks
    fused = (lambda adapters: load(lora=adapters)) if config.lora.rank else None
    return Model(pipe, denoiser.train(), device, fused)

