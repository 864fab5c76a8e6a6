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
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from afresh.errors import UserError
from afresh.progress import Progress
from curate.embed.registry import load_embedder
from curate.reading.images import stack_images
from train.denoising.conditioning import Conditioning
from train.denoising.families.registry import denoiser_of

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
        gradient_checkpointing: see :func:`train.denoising.network.frozen`; for large models.
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
    about = denoiser_of(pipe).encode(list(prompts))[[image for image, _ in pairs]]
    found = zip(about.embeds.float(), pairs, strict=True)
    start = torch.stack([starting_point(caption, search_seed, restart) for caption, (_, restart) in found])
    look = partial(draw, pipe, about=about, seeds=numbers, num_inference_steps=num_inference_steps,
                   guidance_scale=guidance_scale, batch_size=batch_size)  # fmt: skip
    points = _Points(measures, [images[image] for image, _ in pairs for _ in numbers], (len(images), restarts, -1))
    points.add(0, look(start))
    losses, embeds = [], start
    search = search_embeds(
        pipe,
        x_0,
        start,
        [restart for _, restart in pairs],
        steps=steps, learning_rate=learning_rate, noises=noises, seed=search_seed,
        batch_size=batch_size,
        gradient_checkpointing=gradient_checkpointing,
        about=about,
    )  # fmt: skip
    for step, (embeds, loss) in enumerate(search, 1):
        losses.append(loss)
        if not torch.isfinite(loss).all():
            image = pairs[int((~torch.isfinite(loss)).nonzero()[0])][0]
            raise UserError(f"prompt {prompts[image]!r}: the loss is not finite at step {step}; try dtype float32")
        if step == steps or step % measure_every == 0:
            points.add(step, look(embeds))
        if bar is not None:
            bar.update(len(pairs))
    return points.audit(torch.stack(losses, 1), embeds, restarts * len(numbers))


class _Points:
    """What was drawn on the way, measured.

    Args:
        measures: see :func:`audit`.
        originals: one for each image drawn.
        shape: ``(images, restarts, seeds)`` of what is drawn at a time.
    """

    def __init__(
        self, measures: Mapping[str, Measure], originals: Sequence[Image], shape: tuple[int, int, int]
    ) -> None:
        self._measures, self._originals, self._shape = measures, originals, shape
        self._steps: list[int] = []
        self._found: dict[str, list[Floats]] = {name: [] for name in measures}
        self._before: list[Image] = []
        self._drawn: list[Image] = []

    def add(self, step: int, drawn: list[Image]) -> None:
        """Measure what is drawn after so many steps of the search."""
        self._steps.append(step)
        self._before, self._drawn = self._before or drawn, drawn
        for name, compare in self._measures.items():
            values = np.asarray(compare(drawn, self._originals), np.float32)
            self._found[name].append(values.reshape(self._shape))

    def audit(self, loss: torch.Tensor, embeds: torch.Tensor, every: int) -> Audit:
        """All of it, with the losses ``[images · restarts, steps]`` and the embeddings ``[images · restarts, …]``;
        ``every`` is how many images are drawn for one original.
        """
        first, (images, restarts, _) = slice(None, None, every), self._shape
        return Audit(
            points=np.array(self._steps, np.int64),
            measures={name: np.stack(values) for name, values in self._found.items()},
            loss=loss.reshape(images, restarts, -1).cpu().numpy(),
            embeds=embeds.reshape(images, restarts, *embeds.shape[1:]).cpu(),
            before=self._before[first],
            after=self._drawn[first],
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
    about: Conditioning | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Adam on the embeddings ``e`` of the diffusion loss ``E_{t,ε} ‖ε − ε(x_t, e)‖² / numel`` of each ``x_0``
    (arXiv 2507.16880, §3; the weights stay as they are).

    The loss is in ε-space whatever the model predicts, of flow-matching models in that of velocities. Adam works
    element by element, so an image's search does not depend on the others.

    Args:
        pipe: the model.
        x_0: ``[n, c, h, w]`` float32 latents.
        start: ``[n, tokens, width]`` float32.
        restarts: ``[n]``: the randomness of each search; those of one number see the same noises.
        steps, learning_rate, noises, seed, batch_size, gradient_checkpointing: see :func:`audit`.
        about: of n images, what the model is conditioned on beside the embeddings, which stays: pooled ones.

    Yields:
        After each step the embeddings ``[n, tokens, width]`` (a copy), and the loss ``[n]`` before it.
    """
    denoiser = denoiser_of(pipe)
    schedule = denoiser.schedule
    embeds = start.clone().requires_grad_()
    adam = torch.optim.Adam([embeds], lr=learning_rate)
    n = len(x_0)
    for step in range(steps):
        shape, times = x_0.shape[1:], schedule.timesteps
        draws = {restart: _draws(seed, restart, step, noises, shape, times) for restart in restarts}
        loss = torch.zeros(n, device=x_0.device)
        adam.zero_grad()
        with denoiser.frozen(checkpointing=gradient_checkpointing), torch.enable_grad():
            for first in range(0, n * noises, batch_size):
                rows, places = np.divmod(np.arange(first, min(first + batch_size, n * noises)), noises)
                chosen = [draws[restarts[row]] for row in rows]
                t = torch.stack([draw[0][place] for draw, place in zip(chosen, places, strict=True)])
                eps = torch.stack([draw[1][place] for draw, place in zip(chosen, places, strict=True)])
                t, eps = t.to(x_0.device), eps.to(x_0.device)
                x_t = schedule.noised(x_0[rows], eps, t).to(denoiser.dtype)
                sought = embeds[rows].to(denoiser.dtype)
                cond = Conditioning({"embeds": sought}) if about is None else about[rows].with_embeds(sought)
                predicted = denoiser.predict(x_t, t, cond).compared
                target = eps if schedule.space != "velocity" else schedule.target(x_0[rows], eps, t)
                squared = (predicted - target).square().flatten(1).mean(1)
                # Summed over images, so that each has the gradient it would have by itself; Adam minds no gain.
                (denoiser.gain * squared.sum() / noises).backward()
                loss.index_add_(0, torch.from_numpy(rows).to(loss.device), squared.detach() / noises)
        adam.step()
        yield embeds.detach().clone(), loss


def starting_point(caption: torch.Tensor, seed: int, restart: int) -> torch.Tensor:
    """Where a search begins: a prompt's embedding ``[tokens, width]`` itself, or noise of its mean and deviation."""
    if restart == 0:
        return caption
    noise = torch.randn(caption.shape, generator=_generator(0, seed, restart))
    return caption.mean() + caption.std() * noise.to(caption.device)


def encode_images(pipe: StableDiffusionPipeline, images: Sequence[Image]) -> torch.Tensor:
    """Latents ``[n, c, h, w]`` float32 of images: the mean of the VAE's posterior."""
    denoiser = denoiser_of(pipe)
    return denoiser.encode_pixels(torch.from_numpy(stack_images(images, denoiser.side)))


def draw(
    pipe: StableDiffusionPipeline,
    embeds: torch.Tensor,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    about: Conditioning | None = None,
) -> list[Image]:
    """What the stock pipeline draws by DDIM for each of the embeddings ``[n, tokens, width]`` and each seed.

    For ``about`` see :func:`search_embeds`.
    """
    denoiser = denoiser_of(pipe)
    pairs = [(row, seed) for row in range(len(embeds)) for seed in seeds]
    images: list[Image] = []
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        rows, noise = [row for row, _ in batch], denoiser.noise([seed for _, seed in batch])
        cond = Conditioning({"embeds": embeds[rows]}) if about is None else about[rows].with_embeds(embeds[rows])
        images += denoiser.draw(cond, noise, steps=num_inference_steps, guidance_scale=guidance_scale)
    return images


def copy_similarity(embedder: Embedder) -> Measure:
    """The cosine of each drawn image and its original, by a copy detector."""

    def similarity(drawn: Sequence[Image], originals: Sequence[Image]) -> Floats:
        return (embedder.embed(drawn) * embedder.embed(originals)).sum(axis=1)

    return similarity


def _draws(
    seed: int, restart: int, step: int, noises: int, shape: Sequence[int], timesteps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps ``[noises]``, uniform, and noise ``[noises, c, h, w]`` of a step."""
    generator = _generator(1, seed, restart, step)
    t = torch.randint(timesteps, (noises,), generator=generator)
    return t, torch.randn((noises, *shape), generator=generator)


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

