"""``GuidedUnconditional``: DDPM's and DDIM's denoising loop in pixel space, with guidance terms and a trace.

pipe = GuidedUnconditional.from_pipe(ddpm_or_ddim_pipeline)
output = pipe(batch_size=8, guidance=[AMG(PixelIndex(images), preset="pixels")])
output.images, output.trace
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from train.denoising.conditioning import Conditioning
from train.denoising.families.pixels import PixelDenoiser
from train.sampling.guidance import Guidance, Run
from train.sampling.pipelines.loop import GuidedLoop

Labels = int | str | Sequence[int] | Sequence[str] | Tensor


@dataclass
class GuidedImages(ImagePipelineOutput):
    """The stock pipelines' output, and what happened on the way."""

    trace: list[dict[str, Any]] = field(default_factory=list)
    """As that of :class:`~train.sampling.pipelines.stable_diffusion.GuidedOutput`."""


class GuidedUnconditional(DiffusionPipeline):
    """``DDPMPipeline`` or ``DDIMPipeline`` whose ``ε̂`` guidance terms may correct at each step.

    Takes any ``UNet2DModel`` in pixel space, unconditional or conditioned on classes. Without terms it draws the stock
    pipelines' images bit for bit; with terms, so does every image of the batch that no term acts on.

    Args:
        unet: predicts ``[n, c, h, w]``, or twice the channels if it predicts variances too.
        scheduler: a DDPM or DDIM scheduler, or another diffusers scheduler of the same models.
        null_class: the label that stands for no class, if the model has learned one: with it, classifier-free guidance.
        class_names: of the labels from 0, for labels by name and for the captions of an index.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: Any,
        null_class: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_class=null_class, class_names=None if class_names is None else list(class_names))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **overrides: Any) -> GuidedUnconditional:
        """Share another pipeline's components, as they are.

        Args:
            pipeline: a ``DDPMPipeline`` or ``DDIMPipeline``, or one with the same components.
            overrides: arguments of the class to take instead or besides, as in ``null_class=10``.

        Raises:
            ValueError: ``pipeline`` is none of these, or its UNet is not a ``UNet2DModel``.
        """
        parts = {name: getattr(pipeline, name, None) for name in ("unet", "scheduler")} | overrides
        if not isinstance(parts["unet"], UNet2DModel) or parts["scheduler"] is None:
            kind = type(pipeline).__name__
            raise ValueError(f"{kind} is no pixel-space pipeline: it lacks a UNet2DModel or a scheduler")
        guided = cls(**parts)
        guided.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        return guided

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int | None = None,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        class_labels: Labels | None = None,
        guidance_scale: float = 1.0,
        guidance: Sequence[Guidance] = (),
        trace_tensors: bool = False,
    ) -> GuidedImages | tuple[Any]:
        """Draw images.

        Args:
            batch_size: how many.
            generator: one, or one an image.
            eta: η of DDIM, in [0, 1]; other schedulers ignore it.
            num_inference_steps: denoising steps; None is 1000 for a DDPM scheduler and 50 for others, as in the stock
                pipelines.
            use_clipped_model_output: see ``DDIMScheduler.step``.
            output_type: pil, np or pt.
            return_dict: False gives ``(images,)``.
            class_labels: one for all images or one for each: numbers, names, or what the model's class embedding takes.
            guidance_scale: of classifier-free guidance, off at 1; needs a null class.
            guidance: terms that correct ``ε̂``, in this order.
            trace_tensors: keep tensors in the trace, as ``GuidedStableDiffusion`` does.

        Raises:
            ValueError: arguments that do not fit the model or each other.
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} images: give one an image, or one for all")
        device = self._execution_device
        labels = self._labels(class_labels, batch_size, device)
        cfg = guidance_scale != 1.0
        if cfg and (labels is None or self.config.null_class is None):
            raise ValueError("guidance_scale needs class_labels and a null class: from_pipe(pipe, null_class=…)")
        uncond = cond = None
        if labels is not None:
            cond = Conditioning({"labels": labels})
            uncond = Conditioning({"labels": torch.full_like(labels, self.config.null_class)}) if cfg else None

        size = self.unet.config.sample_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        shape = (batch_size, self.unet.config.in_channels, *sides)
        place = torch.device("cpu") if device.type == "mps" else device  # mps draws no reproducible numbers
        image = randn_tensor(shape, generator=generator, device=place, dtype=self.unet.dtype).to(device)

        if num_inference_steps is None:
            num_inference_steps = 1000 if isinstance(self.scheduler, DDPMScheduler) else 50
        self.scheduler.set_timesteps(num_inference_steps)
        image = image * float(self.scheduler.init_noise_sigma)  # 1 for DDPM and DDIM
        offered = {"eta": eta, "use_clipped_model_output": use_clipped_model_output, "generator": generator}
        accepted = set(inspect.signature(self.scheduler.step).parameters)
        step_kwargs = {name: value for name, value in offered.items() if name in accepted}

        run = Run(
            batch_size=batch_size,
            train_timesteps=self.scheduler.config.num_train_timesteps,
            decode=lambda x: (x.float() / 2 + 0.5).clamp(0, 1),
            encode_prompts=lambda texts: Conditioning({"labels": self._named(texts, device)}),
        )
        first, denoiser = self.scheduler.timesteps[0], PixelDenoiser(self.unet)
        loop = GuidedLoop(self.scheduler, denoiser, run, guidance, first, trace_tensors)
        image, cond = loop.prepare(first, image, uncond, cond)
        image = self._denoised(loop, image, uncond, cond, guidance_scale, step_kwargs)
        loop.warn_of_broken()
        image = (image / 2 + 0.5).clamp(0, 1)
        images: Any = image
        if output_type != "pt":
            images = image.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return GuidedImages(images=images, trace=loop.trace.rows()) if return_dict else (images,)

    def _denoised(
        self,
        loop: GuidedLoop,
        image: Tensor,
        uncond: Conditioning | None,
        cond: Conditioning | None,
        guidance_scale: float,
        step_kwargs: dict[str, Any],
    ) -> Tensor:
        """The denoising loop: noise ``[n, c, h, w]`` → images in [-1, 1]."""
        channels = image.shape[1]
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            output_uncond = None
            x_t = self.scheduler.scale_model_input(image, t)
            if uncond is None or cond is None:
                output = output_cond = loop.denoiser(x_t, t, cond)
            else:
                both = loop.denoiser(torch.cat([x_t] * 2), t, Conditioning.join([uncond, cond]))
                output_uncond, output_cond = both.chunk(2)
                noise = output_uncond + guidance_scale * (output_cond - output_uncond)
                # Variances, where the model predicts them, are those under the class, as in DiT.
                output = torch.cat([noise[:, :channels], output_cond[:, channels:]], 1)
            output = loop.correct(i, t, x_t, output_uncond, output_cond, output, uncond, cond, guidance_scale)
            image = self.scheduler.step(output, t, image, **step_kwargs).prev_sample
        return image

    def _labels(self, labels: Labels | None, batch_size: int, device: torch.device) -> Tensor | None:
        conditional = getattr(self.unet, "class_embedding", None) is not None
        if labels is None:
            if conditional:
                raise ValueError("the model is conditioned on classes: give class_labels")
            return None
        if not conditional:
            raise ValueError("class_labels were given, but the model is unconditional")
        if isinstance(labels, str) or (isinstance(labels, Sequence) and any(isinstance(name, str) for name in labels)):
            names: Any = [labels] if isinstance(labels, str) else labels
            labels = self._named(names, device)
        rows = torch.as_tensor(labels, device=device)
        if rows.ndim == 0 or len(rows) == 1:
            rows = rows.reshape(1, *rows.shape[1:]).expand(batch_size, *rows.shape[1:])
        if len(rows) != batch_size:
            raise ValueError(f"{len(rows)} class labels for {batch_size} images: give one an image, or one for all")
        known = self.unet.config.num_class_embeds
        if known is not None and not rows.is_floating_point() and not bool(((rows >= 0) & (rows < known)).all()):
            raise ValueError(f"class labels are 0 to {known - 1}, not {rows.tolist()}")
        return rows

    def _named(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Labels ``[n]`` of classes by name; the empty name is the null class."""
        known, null = self.config.class_names, self.config.null_class
        labels = []
        for name in names:
            if not name and null is not None:
                labels.append(null)
            elif known and name in known:
                labels.append(known.index(name))
            else:
                listed = ", ".join(known or ()) or "none were given"
                raise ValueError(f"class {name!r} is none of class_names: {listed}")
        return torch.tensor(labels, device=device)

