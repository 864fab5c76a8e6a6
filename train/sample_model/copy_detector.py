"""Recipe: train the carried copy detector on the sample set (never on its held-out part), and measure it.

    python -m train.sample_model.copy_detector --config configs/sample_model/copy_detector.yaml

In the manner of SSCD (Pizzi et al., CVPR 2022, arXiv 2202.10261): two edited views of each image, InfoNCE
between them, and the differential-entropy (KoLeo) term that pushes every image away from its nearest
neighbour. Beyond SSCD:

- negatives and nearest neighbours come from the whole set through a memory of last-seen embeddings, because a
  sampler asks for the nearest of *all* training images;
- images that look alike by nature (clock faces, one flag under two names) are no negatives of one another;
- some views are attacked before they are learned from: a few ascent steps, on pixels or on a coarse field as
  an image decoder makes them, that lower the similarity of a copy; it must stay close, so that following the
  detector's gradient changes the drawing and not some noise upon it;
- strong changes of colour and grey views, so that the drawing counts and not its colours.

A run is restartable: every random number is a function of (seed, step), and a checkpoint is written every
``checkpoint_every`` steps. The measurements go to ``copy_detector.json`` beside the weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from curate.console import get_logger, progress, write_json
from curate.copy_detector import WEIGHTS, CopyDetector
from curate.edits import EDITS, strong_edit
from curate.images import decode_image, stack_images
from train.sample_set import load_part

log = get_logger(__name__)


@dataclass
class CopyDetectorConfig:
    """The recipe's settings; the defaults are those of the carried weights."""

    out: str = str(WEIGHTS)  # fp16 safetensors; the measurements go beside it as .json
    work_dir: str = "runs/copy_detector"  # checkpoint
    steps: int = 1200
    batch_size: int = 64  # images, each in two views
    lr: float = 1e-3  # highest, after warmup; cosine to 0
    warmup_steps: int = 50  # of the learning rate
    ramp: float = 0.6  # share of the steps over which edits grow to full strength; then memory and attacks
    weight_decay: float = 0.05
    temperature: float = 0.07  # of InfoNCE
    entropy_weight: float = 3.0  # of the KoLeo term
    alignment_weight: float = 0.5  # of 1 - cosine of the two views
    attack_share: float = 0.5  # of a batch's images
    attack_steps: int = 2
    attack_pixels: float = 8 / 255  # L-infinity bound on pixels
    attack_field: float = 32 / 255  # L-infinity bound on a 16 x 16 field, enlarged to the image
    alike: float = 0.92  # 16 x 16 pixel correlation above which two images are no negatives of each other
    seed: int = 0
    threads: int = 1
    checkpoint_every: int = 50


# ------------------------------------------------------------------------------------------ edits of a batch


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _some(x: Tensor, share: float, edit: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """``edit`` applied to a random ``share`` of the images."""
    rows = (torch.rand(len(x), generator=generator) < share).nonzero().squeeze(1)
    if len(rows) == 0:
        return x
    return x.index_copy(0, rows, edit(x[rows]).clamp(0, 1))


def _affine(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Images seen through ``[[a, b], [c, d]]`` and a shift (white outside), and where the inside is."""
    theta = torch.stack([torch.stack([a, b, shift[:, 0]], 1), torch.stack([c, d, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x - 1, grid, align_corners=False) + 1, (grid.abs().amax(-1) < 1).unsqueeze(1)


def edited(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A random edited view of each image.

    Args:
        x: ``[n, 3, h, w]`` float32 in [0, 1].
        strength: 0 leaves images as they are; 1 is as strong as an edit gets.
        generator: of every random number drawn here.

    Returns:
        The views, shaped as ``x``, in [0, 1].
    """
    s, g = strength, generator
    whole_batch = x

    def each(y: Tensor, low: float, high: float, channels: int = 1) -> Tensor:
        return _uniform((len(y), channels, 1, 1), low, high, g)

    def sticker(y: Tensor) -> Tensor:
        n = len(y)
        other = whole_batch[torch.randint(0, len(whole_batch), (n,), generator=g)]
        size, zero = _uniform((n,), 2.5, 4.5, g), torch.zeros(n)
        pasted, inside = _affine(other, size, zero, zero, size, _uniform((n, 2), -2.2, 2.2, g))
        plain = torch.rand((n, 1, 1, 1), generator=g) < 0.4
        return torch.where(inside, torch.where(plain, each(y, 0, 1, 3), pasted), y)

    def lines(y: Tensor) -> Tensor:  # as a text or a watermark draws them
        n, _, h, w = y.shape
        rows, top = torch.arange(h)[None, :, None], torch.randint(0, h, (n, 1, 1), generator=g)
        band = ((rows >= top) & (rows < top + 9) & (rows % 4 < 2)).unsqueeze(1)
        dashes = F.interpolate(torch.rand((n, 1, h // 4, w // 2), generator=g), size=(h, w)) < 0.6
        return torch.where(band & dashes, each(y, 0, 1, 3), y)

    def place(y: Tensor) -> Tensor:  # crops and borders, shifts, small and quarter turns, mirrors
        n = len(y)
        zoom, aspect = (
            torch.exp(_uniform((n,), -0.25 * s, 0.45 * s, g)),
            torch.exp(_uniform((n,), -0.1 * s, 0.1 * s, g)),
        )
        turned = torch.rand(n, generator=g) < 0.4 * s
        quarters = (torch.rand(n, generator=g) < 0.05 * s) * torch.randint(1, 4, (n,), generator=g)
        angle = turned * _uniform((n,), -0.35, 0.35, g) + quarters * (math.pi / 2)
        flip = 1.0 - 2.0 * (torch.rand(n, generator=g) < 0.3 * s)
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        shift = _uniform((n, 2), -0.15 * s, 0.15 * s, g)
        return _affine(y, flip * cos / aspect, -sin, flip * sin, cos * aspect, shift)[0]

    def colours(y: Tensor) -> Tensor:  # channels mixed at random around grey, which stays grey
        grey = y.mean(1, keepdim=True)
        mix = torch.randn((len(y), 3, 3), generator=g) * 0.6 * s
        mix = mix - mix.mean(2, keepdim=True)
        chroma = y - grey
        return grey + torch.exp(each(y, -s, 0.5 * s)) * chroma + torch.einsum("nij,njhw->nihw", mix, chroma)

    def light(y: Tensor) -> Tensor:  # contrast, brightness, a coloured cast
        middle = y.mean((1, 2, 3), keepdim=True)
        offset = each(y, -0.25 * s, 0.15 * s) + each(y, -0.15 * s, 0.15 * s, 3)
        return middle + torch.exp(each(y, -0.6 * s, 0.3 * s)) * (y - middle) + offset

    def enlarged(y: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(y, size=like.shape[-2:], mode="bilinear")

    def noise(y: Tensor) -> Tensor:  # fine, or a coarse colour field as generators leave it
        cell = 1 if torch.rand((), generator=g) < 0.5 else 8
        n, _, h, w = y.shape
        return y + enlarged(torch.randn((n, 3, h // cell, w // cell), generator=g), y) * each(y, 0, 0.08 * s)

    x = _some(x, 0.3 * s, sticker, g)
    x = _some(x, 0.15 * s, lines, g)
    x = _some(x, min(1.0, 2 * s), place, g)
    x = _some(x, 0.7, colours, g)
    x = _some(x, 0.2 * s, lambda y: y.mean(1, keepdim=True).expand_as(y), g)
    x = _some(x, 0.7, light, g)
    x = _some(x, 0.25, lambda y: y.clamp_min(1e-4) ** torch.exp(each(y, -0.5 * s, 0.5 * s)), g)
    x = _some(x, 0.25 * s, lambda y: enlarged(F.avg_pool2d(y, 2), y), g)
    x = _some(x, 0.1 * s, lambda y: enlarged(F.avg_pool2d(y, 4), y), g)
    x = _some(x, 0.2 * s, lambda y: F.avg_pool2d(y, 3, stride=1, padding=1, count_include_pad=False), g)
    x = _some(x, 0.3 * s, noise, g)
    return _some(x, 0.3 * s, noise, g)


# ------------------------------------------------------------------------------------------------ the attack


def attacked(
    model: CopyDetector,
    views: Tensor,
    targets: Tensor,
    *,
    bound: float,
    coarse: bool,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Views changed within a bound so that they resemble their originals less (projected gradient,
    L-infinity).

    Args:
        model: in evaluation mode.
        views: ``[n, 3, h, w]`` in [0, 1].
        targets: ``[n, d]`` unit embeddings of the originals, no gradient.
        bound: largest change, of a pixel or of a cell of the field, in units of [0, 1].
        coarse: change a 16 × 16 colour field that is enlarged to the image, instead of pixels.
        steps: ascent steps.
        generator: of the random start.

    Returns:
        The changed views, in [0, 1], no gradient.
    """
    h, w = views.shape[-2:]
    cells = (16, 16) if coarse else (h, w)
    delta = (torch.rand((len(views), 3, *cells), generator=generator) * 2 - 1) * bound

    def changed(delta: Tensor) -> Tensor:
        grown = F.interpolate(delta, size=(h, w), mode="bilinear") if coarse else delta
        return (views + grown).clamp(0, 1).contiguous(memory_format=torch.channels_last)

    for _ in range(steps):
        delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad((model(changed(delta)) * targets).sum(), delta)
        delta = (delta.detach() - max(1.5 / steps, 0.1) * bound * gradient.sign()).clamp(-bound, bound)
    return changed(delta.detach())


# ------------------------------------------------------------------------------------------------ the losses


def info_nce(z_a: Tensor, z_b: Tensor, memory: Tensor, alike: Tensor, temperature: float) -> Tensor:
    """InfoNCE of each view against the other view of its image; negatives from the batch and from the memory.

    Args:
        z_a, z_b: ``[n, d]`` unit rows, two views of the same images.
        memory: ``[m, d]`` last-seen embeddings of all images; zero rows were not seen yet.
        alike: ``[n, n + m]`` bool: columns (batch, then memory) that are no negatives of the row.
        temperature: divides the cosines.
    """
    positive = (z_a * z_b).sum(1) / temperature
    losses = []
    for one, two in ((z_a, z_b), (z_b, z_a)):
        negatives = torch.cat([one @ two.T, one @ memory.T, one @ one.T], 1) / temperature
        mask = torch.cat([alike, alike[:, : len(one)]], 1)
        negatives = negatives.masked_fill(mask, float("-inf"))
        losses.append(torch.logsumexp(torch.cat([positive[:, None], negatives], 1), 1) - positive)
    return torch.cat(losses).mean()


def entropy(z: Tensor, others: Tensor, alike: Tensor) -> Tensor:
    """Kozachenko–Leonenko term: minus the mean logarithm of the distance to the nearest other image."""
    nearest = (z @ others.T).masked_fill(alike, -1.0).amax(1)
    return -0.5 * torch.log((2 - 2 * nearest).clamp_min(1e-4)).mean()


def pixels_alike(images: Tensor, threshold: float) -> Tensor:
    """``[n, n]`` bool: 16 × 16 pixels, or grey or mirrored ones, correlate above ``threshold``."""
    small = F.adaptive_avg_pool2d(images, 16)
    result = torch.zeros(len(images), len(images), dtype=torch.bool)
    for channels in (small, small.mean(1, keepdim=True)):
        one = channels.flatten(1) - channels.flatten(1).mean(1, keepdim=True)
        two = channels.flip(-1).flatten(1) - channels.flatten(1).mean(1, keepdim=True)
        one, two = F.normalize(one, dim=1), F.normalize(two, dim=1)
        result |= (one @ one.T > threshold) | (one @ two.T > threshold)
    return result | result.T


# ---------------------------------------------------------------------------------------------- the training


def part_pictures(*names: str) -> list[Image]:
    """The images of parts of the sample set, in order."""
    return [decode_image(sample.image) for name in names for sample in load_part(name)]


def part_images(*names: str) -> Tensor:
    """``[n, 3, 64, 64]`` float32 in [0, 1]: the same as pixels."""
    return torch.from_numpy(stack_images(part_pictures(*names), 64))


def learning_rate(step: int, config: CopyDetectorConfig) -> float:
    """Linear warmup, then a half cosine to 0."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def train(config: CopyDetectorConfig, images: Tensor) -> CopyDetector:
    """The trained detector, in evaluation mode; continues from ``work_dir`` if a run was stopped there.

    Args:
        config: the recipe's settings.
        images: ``[n, 3, 64, 64]`` float32 in [0, 1].
    """
    torch.manual_seed(config.seed)
    model = CopyDetector().to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    )
    memory = torch.zeros(len(images), model.dim)
    alike = pixels_alike(images, config.alike)
    log.info("%d images, %.1f alike each", len(images), alike.float().sum(1).mean() - 1)

    checkpoint, first = Path(config.work_dir) / "checkpoint.pt", 0
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        memory, first = state["memory"], state["step"]
        log.info("continuing at step %d", first)

    order, epoch, per_epoch = None, -1, len(images) // config.batch_size
    seen = {"loss": 0.0, "copies": 0.0, "attacked": 0.0, "nearest": 0.0}
    started = time.monotonic()
    with progress(total=config.steps - first, desc="copy detector", unit="step") as bar:
        for step in range(first, config.steps):
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(
                    len(images), generator=torch.Generator().manual_seed(config.seed + 7919 * epoch)
                )
            rows = order[step % per_epoch * config.batch_size :][: config.batch_size]
            batch = images[rows]
            strength = min(1.0, 0.4 + 0.6 * step / (config.ramp * config.steps))
            hardened = step >= config.ramp * config.steps
            view_a = edited(batch, 0.3, generator).contiguous(memory_format=torch.channels_last)
            view_b = edited(batch, strength, generator).contiguous(memory_format=torch.channels_last)
            view_b, n_attacked = view_b.clone(), 0
            if hardened:
                n_attacked = round(config.attack_share * len(rows))
                model.eval()
                with torch.autocast("cpu", torch.bfloat16):
                    with torch.no_grad():
                        targets = model(view_a[:n_attacked])
                    coarse = step % 2 == 0
                    # A milder view under attack: half the edit, all of the attack's bound.
                    start = edited(batch[:n_attacked], 0.5, generator)
                    view_b[:n_attacked] = attacked(
                        model,
                        start,
                        targets,
                        bound=config.attack_field if coarse else config.attack_pixels,
                        coarse=coarse,
                        steps=config.attack_steps,
                        generator=generator,
                    )
            model.train()
            with torch.autocast("cpu", torch.bfloat16):
                z = model(torch.cat([view_a, view_b]).contiguous(memory_format=torch.channels_last))
            z_a, z_b = z.chunk(2)
            # Embeddings that are seconds old are of use once the network has settled.
            others = memory if hardened else memory[:0]
            near = torch.cat([alike[rows][:, rows], alike[rows][:, : len(others)]], 1)
            everything = torch.cat([z_a, others])
            spread = 0.5 * (entropy(z_a, everything, near) + entropy(z_b, everything, near))
            align = (1 - (z_a * z_b).sum(1)).mean()
            contrast = info_nce(z_a, z_b, others, near, config.temperature)
            loss = contrast + config.entropy_weight * spread + config.alignment_weight * align
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

            with torch.no_grad():
                memory[rows] = z_a.detach()
                cosine = (z_a * z_b).sum(1)
                nearest = (z_a @ memory.T).masked_fill(alike[rows], -1).amax(1)
                seen["loss"] += loss.item()
                seen["copies"] += cosine[n_attacked:].mean().item()
                seen["attacked"] += cosine[:n_attacked].mean().item() if n_attacked else 0.0
                seen["nearest"] += nearest.mean().item()
            bar.update(1)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                means = "  ".join(f"{k} {v / config.checkpoint_every:.3f}" for k, v in seen.items())
                log.info("step %d  %s  %.0f s", step + 1, means, time.monotonic() - started)
                seen = dict.fromkeys(seen, 0.0)
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "memory": memory,
                    "step": step + 1,
                }
                torch.save(state, checkpoint.with_suffix(".part"))
                checkpoint.with_suffix(".part").replace(checkpoint)
    return model.eval()


# -------------------------------------------------------------------------------------------- the measurement


def measure(model: CopyDetector, images: Tensor, held_out: Sequence[Image], *, seed: int) -> dict[str, Any]:
    """What the detector is worth, on images that it was never trained on.

    Args:
        model: in evaluation mode.
        images: ``[n, 3, 64, 64]``, the set that a sampler would search.
        held_out: images that stand in no part it was trained on.
        seed: of the edits and attacks.

    Returns:
        - ``unrelated``: cosine of held-out images with images of the set: mean and standard deviation,
        - ``nearest``: cosine of each with its nearest image of the set: quantiles. The 99 % quantile is the
          ``threshold`` of what follows: one image in a hundred is a false copy at it,
        - ``copies``: for each edit, mean cosine of a held-out image with its edited self, and the share above
          the threshold (recall),
        - ``attacked``: the same of mild copies attacked by 20 steps on pixels (L-infinity 8/255) or on a
          coarse field (32/255),
        - ``descended``: images whose score was followed down to the threshold by steps of L2 length 0.5: the
          L2 distance and the 16 × 16 pixel correlation at which it was reached (or not, in 60 steps).
    """
    with torch.inference_mode():
        index = torch.cat([model(x) for x in images.split(256)])

    def embedded(pictures: Sequence[Image]) -> Tensor:
        with torch.inference_mode():
            return model(torch.from_numpy(stack_images(pictures, model.size)))

    originals = embedded(held_out)
    cosine = originals @ index.T
    nearest = cosine.amax(1)
    threshold = nearest.quantile(0.99).item()

    def against_originals(z: Tensor) -> dict[str, float]:
        similarity = (z * originals[: len(z)]).sum(1)
        return {"mean": similarity.mean().item(), "recall": (similarity > threshold).float().mean().item()}

    rng = np.random.default_rng(seed)
    copies = {
        name: against_originals(embedded([edit(image, rng) for image in held_out]))
        for name, edit in (EDITS | {"several": strong_edit}).items()
    }

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.from_numpy(stack_images(held_out[:64], model.size))
    target = originals[:64].clone()
    attacks = {}
    for name, coarse, bound in (("pixels", False, 8 / 255), ("field", True, 32 / 255)):
        start = edited(pixels, 0.2, generator)
        changed = attacked(model, start, target, bound=bound, coarse=coarse, steps=20, generator=generator)
        with torch.inference_mode():
            attacks[name] = against_originals(model(changed))

    x, done = pixels.clone(), torch.zeros(len(pixels), dtype=torch.bool)
    for _ in range(60):
        x.requires_grad_(True)
        similarity = (model(x) * target).sum(1)
        done = similarity.detach() <= threshold
        (gradient,) = torch.autograd.grad(similarity.sum(), x)
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        step = torch.where(done.view(-1, 1, 1, 1), 0.0, 0.5) * gradient / length
        x = (x.detach() - step).clamp(0, 1)
    correlation = pixel_correlation(pixels, x)
    quantiles = {f"{q:.0%}": nearest.quantile(q).item() for q in (0.5, 0.95, 0.99)}
    result = {
        "unrelated": {"mean": cosine.mean().item(), "std": cosine.std().item()},
        "nearest": quantiles,
        "threshold": threshold,
        "copies": copies,
        "attacked": attacks,
        "descended": {
            "reached": done.float().mean().item(),
            "distance": (x - pixels).flatten(1).norm(dim=1).mean().item(),
            "pixel_correlation": correlation.mean().item(),
            "still_above_0.9": (correlation > 0.9).float().mean().item(),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return _rounded(result)


def pixel_correlation(a: Tensor, b: Tensor) -> Tensor:
    """``[n]``: plain correlation of the images' 16 × 16 pixels."""
    a, b = (F.adaptive_avg_pool2d(x, 16).flatten(1) for x in (a, b))
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def run(config: CopyDetectorConfig) -> dict[str, Any]:
    """Train, write weights and measurements, and return the latter."""
    torch.set_num_threads(config.threads)
    images, pictures = part_images("pretrain", "finetune"), part_pictures("held_out")
    train(config, images).save(config.out)
    summary = measure(CopyDetector.load(config.out), images, pictures, seed=config.seed)
    summary |= {"settings": asdict(config) | {"out": Path(config.out).name}}
    write_json(Path(config.out).with_suffix(".json"), summary)
    return summary


def main() -> None:
    """Command line: ``--config FILE`` and ``--key value``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description="Train and measure the carried copy detector.")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(CopyDetectorConfig)
    config = parser.parse_args()
    config.pop("config", None)
    print(json.dumps(run(CopyDetectorConfig(**config.as_dict())), indent=1))


if __name__ == "__main__":
    main()
