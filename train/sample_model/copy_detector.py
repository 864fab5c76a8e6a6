"""Recipe: train the carried copy detector on the sample set (never on its held-out part), and measure it.

    python -m train.sample_model.copy_detector --config configs/sample_model/copy_detector.yaml

In the manner of SSCD (Pizzi et al., CVPR 2022, arXiv 2202.10261): two edited views of each image, InfoNCE
between them, and the differential-entropy (KoLeo) term that pushes every image away from its nearest
neighbour. Beyond SSCD:

- negatives and nearest neighbours come from the whole set through a memory of embeddings, renewed every epoch,
  because a sampler asks for the nearest of *all* training images; and each image stands in its batch beside
  one that it is taken for;
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

from curate.console import get_logger, progress, write_atomic, write_json
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
    temperature: float = 0.05  # of InfoNCE
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
        size, zero = _uniform((n,), 3.0, 5.0, g), torch.zeros(n)
        pasted, inside = _affine(other, size, zero, zero, size, _uniform((n, 2), -2.5, 2.5, g))
        plain = torch.rand((n, 1, 1, 1), generator=g) < 0.4
        return torch.where(inside, torch.where(plain, each(y, 0, 1, 3), pasted), y)

    def lines(y: Tensor) -> Tensor:  # as a text or a watermark draws them
        n, _, h, w = y.shape
        rows, top = torch.arange(h)[None, :, None], torch.randint(0, h, (n, 1, 1), generator=g)
        band = ((rows >= top) & (rows < top + 9) & (rows % 4 < 2)).unsqueeze(1)
        dashes = F.interpolate(torch.rand((n, 1, h // 4, w // 2), generator=g), size=(h, w)) < 0.6
        return torch.where(band & dashes, each(y, 0, 1, 3), y)

    def place(y: Tensor) -> Tensor:  # crops and borders, shifts, small turns, mirrors
        n = len(y)
        zoom, aspect = (
            torch.exp(_uniform((n,), -0.2 * s, 0.3 * s, g)),
            torch.exp(_uniform((n,), -0.08 * s, 0.08 * s, g)),
        )
        turned = torch.rand(n, generator=g) < 0.3 * s
        angle = turned * _uniform((n,), -0.3, 0.3, g)
        flip = 1.0 - 2.0 * (torch.rand(n, generator=g) < 0.25 * s)
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        shift = _uniform((n, 2), -0.1 * s, 0.1 * s, g)
        return _affine(y, flip * cos / aspect, -sin, flip * sin, cos * aspect, shift)[0]

    def colours(y: Tensor) -> Tensor:  # channels mixed at random around grey, which stays grey
        grey = y.mean(1, keepdim=True)
        mix = torch.randn((len(y), 3, 3), generator=g) * 0.5 * s
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

    x = _some(x, 0.25 * s, sticker, g)
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
        with torch.autocast("cpu", torch.bfloat16):
            similarity = (model(changed(delta)) * targets).sum()
        (gradient,) = torch.autograd.grad(similarity, delta)
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


def hard_batches(memory: Tensor, alike: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """``[batches, batch_size]`` rows: each image once, beside another one that lies near it now.

    Args:
        memory: ``[n, d]`` present embeddings of all images.
        alike: ``[n, n]`` bool, images that are not to be told apart.
        batch_size: even.
        generator: of the order, and of which of the four nearest comes along.
    """
    half = batch_size // 2
    order = torch.randperm(len(memory), generator=generator)[: len(memory) // half * half]
    nearest = (memory[order] @ memory.T).masked_fill(alike[order], -2).topk(4, dim=1).indices
    pick = torch.randint(0, 4, (len(order), 1), generator=generator)
    partner = nearest.gather(1, pick).squeeze(1)
    return torch.cat([order.view(-1, half), partner.view(-1, half)], 1)


def train(config: CopyDetectorConfig, images: Tensor) -> CopyDetector:
    """The trained detector, in evaluation mode; continues from ``work_dir`` if a run was stopped there.

    Args:
        config: the recipe's settings.
        images: ``[n, 3, 64, 64]`` float32 in [0, 1].
    """
    torch.manual_seed(config.seed)
    images = images.contiguous(memory_format=torch.channels_last)
    model = CopyDetector()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
    )
    alike = pixels_alike(images, config.alike)
    log.info("%d images, %.1f alike each", len(images), alike.float().sum(1).mean() - 1)

    first, memory, batches = 0, torch.empty(0), torch.empty(0)
    checkpoint = Path(config.work_dir) / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, memory, batches = state["step"], state["memory"], state["batches"]
        log.info("continuing at step %d", first)

    per_epoch = len(images) // (config.batch_size // 2)
    seen = {"loss": 0.0, "copies": 0.0, "attacked": 0.0, "nearest": 0.0}
    started = time.monotonic()
    with progress(total=config.steps - first, desc="copy detector", unit="step") as bar:
        for step in range(first, config.steps):
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            if step % per_epoch == 0:
                memory = embedded(model, images)
                batches = hard_batches(memory, alike, config.batch_size, generator)
            rows = batches[step % per_epoch]
            batch = images[rows]
            grown = min(1.0, step / (config.ramp * config.steps))
            view_a = edited(batch, 0.3, generator)
            view_b = edited(batch, 0.4 + 0.6 * grown, generator)
            n_attacked = round(config.attack_share * len(rows)) if grown == 1 else 0
            if n_attacked:
                coarse = step % 2 == 0
                # Under attack a view is edited less: the two together must leave a copy that one can see.
                view_b[:n_attacked] = attacked(
                    model.eval(),
                    edited(batch[:n_attacked], 0.5, generator),
                    embedded(model, view_a[:n_attacked]),
                    bound=config.attack_field if coarse else config.attack_pixels,
                    coarse=coarse,
                    steps=config.attack_steps,
                    generator=generator,
                )
            model.train()
            with torch.autocast("cpu", torch.bfloat16):
                z_a, z_b = model(torch.cat([view_a, view_b])).chunk(2)
            near = torch.cat([alike[rows][:, rows], alike[rows]], 1)
            everything = torch.cat([z_a, memory])
            spread = 0.5 * (entropy(z_a, everything, near) + entropy(z_b, everything, near))
            cosine = (z_a * z_b).sum(1)
            loss = (
                info_nce(z_a, z_b, memory, near, config.temperature)
                + config.entropy_weight * spread
                + config.alignment_weight * (1 - cosine).mean()
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

            with torch.no_grad():
                seen["loss"] += loss.item()
                seen["copies"] += cosine[n_attacked:].mean().item()
                seen["attacked"] += cosine[:n_attacked].mean().item() if n_attacked else 0.0
                seen["nearest"] += (z_a @ memory.T).masked_fill(alike[rows], -1).amax(1).mean().item()
            bar.update(1)
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                means = "  ".join(f"{k} {v / config.checkpoint_every:.3f}" for k, v in seen.items())
                log.info("step %d  %s  %.0f s", step + 1, means, time.monotonic() - started)
                seen = dict.fromkeys(seen, 0.0)
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "memory": memory,
                    "batches": batches,
                }
                with write_atomic(checkpoint) as path:
                    torch.save(state, path)
    return model.eval()


def embedded(model: CopyDetector, images: Tensor) -> Tensor:
    """``[n, d]`` embeddings in evaluation mode, in bfloat16 where it pays, no gradient."""
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model(some) for some in images.split(256)])


# -------------------------------------------------------------------------------------------- the measurement


def measure(
    model: CopyDetector, images: Tensor, held_out: Sequence[Image], *, alike: float, seed: int
) -> dict[str, Any]:
    """What the detector is worth, on images that it was never trained on.

    Args:
        model: in evaluation mode.
        images: ``[n, 3, 64, 64]``, the set that a sampler would search.
        held_out: images that stand in no part it was trained on.
        alike: pixel correlation, grey or mirrored too, above which two images are twins: one drawing.
        seed: of the edits and attacks.

    Returns:
        - ``unrelated``: cosine of held-out images with images of the set: mean and standard deviation,
        - ``nearest``: cosine of each with its nearest image of the set: quantiles; ``nearest_distinct``: twins
          (a heart in another colour) left out. The 99 % quantile of the latter is the ``threshold`` of what
          follows: one image in a hundred is a false copy at it,
        - ``copies``: for each edit, mean cosine of a held-out image with its edited self, and the share above
          the threshold (recall),
        - ``attacked``: the same of mild copies attacked by 20 steps on pixels (L-infinity 8/255) or on a
          coarse field (32/255),
        - ``descended``: images whose score was followed down to 0.5 by at most 60 steps of L2 length 0.5: the
          share that got there, the L2 distance, and the 16 × 16 pixel correlation that was left.
    """
    with torch.inference_mode():
        index = torch.cat([model(x) for x in images.split(256)])

    def looked_at(pictures: Sequence[Image]) -> Tensor:
        with torch.inference_mode():
            return model(torch.from_numpy(stack_images(pictures, model.size)))

    originals = looked_at(held_out)
    cosine = originals @ index.T
    pixels = torch.from_numpy(stack_images(held_out, model.size))
    twins = pixels_alike(torch.cat([pixels, images]), alike)[: len(pixels), len(pixels) :]
    nearest, distinct = cosine.amax(1), cosine.masked_fill(twins, -1).amax(1)
    threshold = distinct.quantile(0.99).item()

    def against_originals(z: Tensor) -> dict[str, float]:
        similarity = (z * originals[: len(z)]).sum(1)
        return {"mean": similarity.mean().item(), "recall": (similarity > threshold).float().mean().item()}

    rng = np.random.default_rng(seed)
    copies = {
        name: against_originals(looked_at([edit(image, rng) for image in held_out]))
        for name, edit in (EDITS | {"several": strong_edit}).items()
    }

    generator = torch.Generator().manual_seed(seed)
    pixels = pixels[:64]
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
        done = similarity.detach() <= 0.5
        (gradient,) = torch.autograd.grad(similarity.sum(), x)
        length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        step = torch.where(done.view(-1, 1, 1, 1), 0.0, 0.5) * gradient / length
        x = (x.detach() - step).clamp(0, 1)
    correlation = pixel_correlation(pixels, x)

    def quantiles(values: Tensor) -> dict[str, float]:
        return {f"{q:.0%}": values.quantile(q).item() for q in (0.5, 0.95, 0.99)}

    result = {
        "unrelated": {"mean": cosine.mean().item(), "std": cosine.std().item()},
        "nearest": quantiles(nearest),
        "nearest_distinct": quantiles(distinct),
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
    summary = measure(CopyDetector.load(config.out), images, pictures, alike=config.alike, seed=config.seed)
    summary["settings"] = {k: v for k, v in asdict(config).items() if k not in ("out", "work_dir")}
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
