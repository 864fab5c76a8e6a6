"""Edits that the copy detector is trained on, in batches, on tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from curate.embed.copy_detector import CopyDetector


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

