"""What the copy detector finds of copies, by edit, beside what it takes for copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from curate.embed.copy_detector import CopyDetector
from curate.embed.edits import EDITS, strong_edit
from curate.reading.images import stack_images
from train.sample_model.copy_detector.edits import attacked, edited

Judged = Callable[[Tensor], dict[str, float]]
"""From embeddings of copies to their mean cosine with the originals, and their recall."""


def embedded(model: CopyDetector, images: Tensor) -> Tensor:
    """``[n, d]`` embeddings in evaluation mode, in bfloat16 where it pays, no gradient."""
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model(some) for some in images.split(256)])


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

    copies = measure_copies(looked_at, held_out, against_originals, seed)
    attacks = measure_attacks(model, pixels[:64], originals[:64].clone(), against_originals, seed)
    descended = measure_descent(model, pixels[:64], originals[:64].clone())

    def quantiles(values: Tensor) -> dict[str, float]:
        return {f"{q:.0%}": values.quantile(q).item() for q in (0.5, 0.95, 0.99)}

    result = {
        "unrelated": {"mean": cosine.mean().item(), "std": cosine.std().item()},
        "nearest": quantiles(nearest),
        "nearest_distinct": quantiles(distinct),
        "threshold": threshold,
        "copies": copies,
        "attacked": attacks,
        "descended": descended,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return _rounded(result)


def measure_copies(
    looked_at: Callable[[Sequence[Image]], Tensor], held_out: Sequence[Image], judged: Judged, seed: int
) -> dict[str, dict[str, float]]:
    """Of every kind of edit, and of several at once: what the detector sees of the edited images."""
    rng = np.random.default_rng(seed)
    return {
        name: judged(looked_at([edit(image, rng) for image in held_out]))
        for name, edit in (EDITS | {"several": strong_edit}).items()
    }


def measure_attacks(
    model: CopyDetector, pixels: Tensor, target: Tensor, judged: Judged, seed: int
) -> dict[str, dict[str, float]]:
    """Of mild copies that were attacked, on pixels and on a coarse field.

    Args:
        model: in evaluation mode.
        pixels: ``[n, 3, H, W]`` originals.
        target: ``[n, d]`` their embeddings.
        judged: from embeddings of copies to their mean cosine and recall.
        seed: of the copies' edits and of the attacks.
    """
    generator = torch.Generator().manual_seed(seed)
    attacks = {}
    for name, coarse, bound in (("pixels", False, 8 / 255), ("field", True, 32 / 255)):
        start = edited(pixels, 0.2, generator)
        changed = attacked(model, start, target, bound=bound, coarse=coarse, steps=20, generator=generator)
        with torch.inference_mode():
            attacks[name] = judged(model(changed))
    return attacks


def measure_descent(model: CopyDetector, pixels: Tensor, target: Tensor) -> dict[str, float]:
    """Of images whose similarity to ``target``, their own embedding, is followed down to 0.5."""
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
    return {
        "reached": done.float().mean().item(),
        "distance": (x - pixels).flatten(1).norm(dim=1).mean().item(),
        "pixel_correlation": correlation.mean().item(),
        "still_above_0.9": (correlation > 0.9).float().mean().item(),
    }


def pixel_correlation(a: Tensor, b: Tensor) -> Tensor:
    """``[n]``: plain correlation of the images' 16 × 16 pixels."""
    a, b = (F.adaptive_avg_pool2d(x, 16).flatten(1) for x in (a, b))
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


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
