"""The adversarial check: does a model that no longer draws a training image still hold it?

Kowalczuk, Hintersdorf, Struppek et al., "Finding Dori: Memorization in Text-to-Image Diffusion Models Is Not Local"
(arXiv 2507.16880): where neurons are blocked, a text embedding that is optimised to denoise the training
image brings it back. The same search is run for images that the model was never trained on: what succeeds there says
how much the search can draw by itself.

    from train.memorization import audit
    found = audit(pipe, images, captions)                        # also with blocked neurons, or a filtered model
    found.measures["similarity"]                                 # [points, images, restarts, seeds]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from afresh.errors import UserError
from afresh.progress import Progress
from curate.embed.registry import load_embedder
from curate.reading.images import stack_images
from train.denoising.predictions import to_eps
from train.denoising.stable_diffusion import (
    FLOAT16_GAIN,
    encode_captions,
    frozen,
    initial_noise,
    latent_shape,
    pixel_size,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from curate.embed.protocol import Embedder


Floats = NDArray[np.float32]
Measure = Callable[[Sequence["Image"], Sequence["Image"]], NDArray[np.floating]]
"""``(drawn [n], originals [n]) → [n]``, row by row."""


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found."""

    points: NDArray[np.int64]
    """``[points]``: after how many steps of the search images were drawn; the first is 0, the prompt alone."""
    measures: dict[str, Floats]
    """By name ``[points, images, restarts, seeds]``."""
    loss: Floats
    """``[images, restarts, steps]``: mean squared error in ε-space before each step, over that step's noises."""
    embeds: torch.Tensor
    """``[images, restarts, tokens, width]`` float32: what was found, for ``prompt_embeds`` of a pipeline."""
    before: list[Image]
    """What the starting points draw, of each image the first restart (its prompt) and seed."""
    after: list[Image]
    """What the found embeddings draw with the same noise."""


def audit(
    pipe: StableDiffusionPipeline,
    images: Sequence[Image],
    prompts: Sequence[str],
    *,
    steps: int = 50,
    learning_rate: float = 0.1,
    noises: int = 8,
    restarts: int = 1,
    search_seed: int = 0,
    measures: Mapping[str, Measure] | None = None,
    measure_every: int = 10,
    seeds: int | Sequence[int] = 4,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int = 8,
    gradient_checkpointing: bool = False,
    bar: Progress | None = None,
) -> Audit:
    """Search an embedding for each image that brings it back, and measure on the way what it draws.

    Args:
        pipe: the model to audit, in the state to audit it in; it is not changed.
        images: the originals; squashed to the model's square.
        prompts: as many: where each search begins.
        steps: of Adam, per restart.
        learning_rate: of Adam.
        noises: timesteps and noises per image and step.
        restarts: searches per image: the first from the prompt's embedding, the others from normal noise of its mean
            and deviation.
        search_seed: of timesteps, noises and starting points; they are the same for every image.
        measures: what to compare drawn images and originals by; None takes the cosine of the carried copy detector, as
            ``similarity``.
        measure_every: steps after which images are drawn; also before the first and after the last.
        seeds: initial noises of the drawn images: how many (0, 1, …), or which ones.
        num_inference_steps: DDIM steps of the drawn images.
        guidance_scale: their classifier-free guidance scale.
        batch_size: images per UNet call.
        gradient_checkpointing: see :func:`train.denoising.stable_diffusion.frozen`; for large models.
        bar: told of each step of each image and restart.

    Raises:
        ValueError: there are no images, or not as many prompts.
        UserError: a loss is not finite.
    """
    if not len(images) or len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: expected as many, and at least one")
    measures = measures or {"similarity": copy_similarity(load_embedder("copy-detector"))}
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    pairs = [(image, restart) for image in range(len(images)) for restart in range(restarts)]
    x_0 = encode_images(pipe, images)[[image for image, _ in pairs]]
    captions = encode_captions(pipe, list(prompts)).float()
    start = torch.stack([starting_point(captions[image], search_seed, restart) for image, restart in pairs])
    originals = [images[image] for image, _ in pairs for _ in numbers]

    points: list[int] = []
    found: dict[str, list[Floats]] = {name: [] for name in measures}
    drawn: list[Image] = []
    before: list[Image] = []

    def measure(step: int, embeds: torch.Tensor) -> None:
        nonlocal drawn
        drawn = draw(pipe, embeds, numbers, num_inference_steps, guidance_scale, batch_size)
        points.append(step)
        for name, compare in measures.items():
            values = np.asarray(compare(drawn, originals), np.float32)
            found[name].append(values.reshape(len(images), restarts, len(numbers)))

    measure(0, start)
    before = drawn
    losses = []
    search = search_embeds(
        pipe,
        x_0,
        start,
        [restart for _, restart in pairs],
        steps=steps,
        learning_rate=learning_rate,
        noises=noises,
        seed=search_seed,
        batch_size=batch_size,
        gradient_checkpointing=gradient_checkpointing,
    )
    embeds = start
    for step, (embeds, loss) in enumerate(search, 1):
        losses.append(loss)
        if not torch.isfinite(loss).all():
            image = pairs[int((~torch.isfinite(loss)).nonzero()[0])][0]
            raise UserError(f"prompt {prompts[image]!r}: the loss is not finite at step {step}; try dtype float32")
        if step == steps or step % measure_every == 0:
            measure(step, embeds)
        if bar is not None:
            bar.update(len(pairs))
    first = slice(None, None, restarts * len(numbers))
    return Audit(
        points=np.array(points, np.int64),
        measures={name: np.stack(values) for name, values in found.items()},
        loss=torch.stack(losses, 1).reshape(len(images), restarts, -1).cpu().numpy(),
        embeds=embeds.reshape(len(images), restarts, *embeds.shape[1:]).cpu(),
        before=before[first],
        after=drawn[first],
    )


def search_embeds(
    pipe: StableDiffusionPipeline,
    x_0: torch.Tensor,
    start: torch.Tensor,
    restarts: Sequence[int],
    *,
    steps: int,
    learning_rate: float,
    noises: int,
    seed: int,
    batch_size: int,
    gradient_checkpointing: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Adam on the embeddings ``e`` of the diffusion loss ``E_{t,ε} ‖ε − ε(x_t, e)‖² / numel`` of each ``x_0``
    (arXiv 2507.16880, §3; the weights stay as they are).

    The loss is in ε-space whatever the model predicts. Adam works element by element, so an image's search does not
    depend on the others.

    Args:
        pipe: the model.
        x_0: ``[n, c, h, w]`` float32 latents.
        start: ``[n, tokens, width]`` float32.
        restarts: ``[n]``: the randomness of each search; those of one number see the same noises.
        steps, learning_rate, noises, seed, batch_size, gradient_checkpointing: see :func:`audit`.

    Yields:
        After each step the embeddings ``[n, tokens, width]`` (a copy), and the loss ``[n]`` before it.
    """
    unet = pipe.unet
    alpha_bar, kind = _alpha_bar(pipe).to(x_0.device), pipe.scheduler.config.prediction_type
    embeds = start.clone().requires_grad_()
    adam = torch.optim.Adam([embeds], lr=learning_rate)
    n = len(x_0)
    gain = FLOAT16_GAIN if unet.dtype == torch.float16 else 1.0  # Adam does not mind
    for step in range(steps):
        draws = {restart: _draws(seed, restart, step, noises, x_0.shape[1:], len(alpha_bar)) for restart in restarts}
        loss = torch.zeros(n, device=x_0.device)
        adam.zero_grad()
        with frozen(unet, checkpointing=gradient_checkpointing), torch.enable_grad():
            for first in range(0, n * noises, batch_size):
                rows, places = np.divmod(np.arange(first, min(first + batch_size, n * noises)), noises)
                chosen = [draws[restarts[row]] for row in rows]
                t = torch.stack([draw[0][place] for draw, place in zip(chosen, places, strict=True)])
                eps = torch.stack([draw[1][place] for draw, place in zip(chosen, places, strict=True)])
                t, eps = t.to(x_0.device), eps.to(x_0.device)
                a = alpha_bar[t].view(-1, 1, 1, 1)
                x_t = (a.sqrt() * x_0[rows] + (1 - a).sqrt() * eps).to(unet.dtype)
                output = unet(x_t, t, encoder_hidden_states=embeds[rows].to(unet.dtype), return_dict=False)[0]
                predicted = to_eps(output.float(), x_t.float(), alpha_bar[t], kind)
                squared = (predicted - eps).square().flatten(1).mean(1)
                # Summed over images, so that each has the gradient it would have by itself.
                (gain * squared.sum() / noises).backward()
                loss.index_add_(0, torch.from_numpy(rows).to(loss.device), squared.detach() / noises)
        adam.step()
        yield embeds.detach().clone(), loss


def starting_point(caption: torch.Tensor, seed: int, restart: int) -> torch.Tensor:
    """Where a search begins: a prompt's embedding ``[tokens, width]`` itself, or noise of its mean and deviation."""
    if restart == 0:
        return caption
    noise = torch.randn(caption.shape, generator=_generator(0, seed, restart))
    return caption.mean() + caption.std() * noise.to(caption.device)


@torch.no_grad()
def encode_images(pipe: StableDiffusionPipeline, images: Sequence[Image]) -> torch.Tensor:
    """Latents ``[n, c, h, w]`` float32 of images: the mean of the VAE's posterior."""
    latents = []
    for image in images:
        pixels = torch.from_numpy(stack_images([image], pixel_size(pipe))).to(pipe.vae.device, pipe.vae.dtype)
        latents.append(pipe.vae.encode(pixels * 2 - 1).latent_dist.mean.float() * pipe.vae.config.scaling_factor)
    return torch.cat(latents)


@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline,
    embeds: torch.Tensor,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
) -> list[Image]:
    """What the stock pipeline draws by DDIM for each of the embeddings ``[n, tokens, width]`` and each seed."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    stock = StableDiffusionPipeline(
        **parts,
        scheduler=DDIMScheduler.from_config(pipe.scheduler.config),  # its own: drawing moves a scheduler's state
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    shape, dtype, device = latent_shape(pipe.unet), pipe.unet.dtype, pipe.unet.device
    empty = encode_captions(pipe, [""]).to(dtype)
    pairs = [(row, seed) for row in range(len(embeds)) for seed in seeds]
    images: list[Image] = []
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        chosen = embeds[[row for row, _ in batch]].to(device, dtype)
        images += stock(
            prompt_embeds=chosen,
            negative_prompt_embeds=empty.expand_as(chosen),
            latents=torch.stack([initial_noise(shape, seed) for _, seed in batch]).to(device, dtype),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        ).images
    return images


def copy_similarity(embedder: Embedder) -> Measure:
    """The cosine of each drawn image and its original, by a copy detector."""

    def similarity(drawn: Sequence[Image], originals: Sequence[Image]) -> Floats:
        return (embedder.embed(drawn) * embedder.embed(originals)).sum(axis=1)

    return similarity


def _alpha_bar(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """``ᾱ`` ``[timesteps]`` float32 of the forward process, whatever sampler the pipeline has."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod


def _draws(
    seed: int, restart: int, step: int, noises: int, shape: Sequence[int], timesteps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps ``[noises]``, uniform, and noise ``[noises, c, h, w]`` of a step."""
    generator = _generator(1, seed, restart, step)
    t = torch.randint(timesteps, (noises,), generator=generator)
    return t, torch.randn((noises, *shape), generator=generator)


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

