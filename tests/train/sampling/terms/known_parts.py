"""A denoiser, a decoder, an embedder and an index of closed form, for terms of guidance."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from train.denoising.coefficients import Coefficients
from train.denoising.conditioning import Conditioning
from train.sampling.guidance import Run, State, guide
from train.sampling.terms.amg import AMG

PIXELS = 3 * 8 * 8
TO_FEATURES = torch.randn(32, PIXELS, generator=torch.Generator().manual_seed(1))


class Embedder:
    """``f = W·pixels``, normalised."""

    name, dim, size = "linear", 32, 8

    def features(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.normalize((pixels.flatten(1) - 0.5) @ TO_FEATURES.T, dim=1)


class Index:
    """What guidance uses of a training-set index, with the calibration ``σ = slope·cosine``."""

    def __init__(self, embeddings: Tensor, captions: list[str], counts: list[int], slope: float = 1.0) -> None:
        self.embeddings = torch.nn.functional.normalize(embeddings, dim=1).numpy()
        self.captions, self.counts, self.slope = captions, np.array(counts), slope
        self.embedder = "linear"

    def hold(self, device: object = None) -> None:
        """It is in memory as it is."""

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        cosine = np.asarray(vectors, np.float32) @ self.embeddings.T
        rows = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(cosine, rows, 1), rows

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        return self.embeddings[rows]

    def calibrate(self, cosine):
        return self.slope * cosine


def decode(latents: Tensor) -> Tensor:
    return 0.5 + 0.1 * latents[:, :3]


def embed(text: str) -> Conditioning:
    seed = sum(text.encode())
    return Conditioning({"embeds": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))})


def denoise(x_t: Tensor, cond: Conditioning, rows: Tensor | None = None) -> Tensor:
    """``ε(x, e) = 0.9·x + 0.1·e + 0.05·sin(x)``."""
    return 0.9 * x_t + 0.1 * cond.embeds + 0.05 * torch.sin(x_t)


def make_state(prompts: list[str], t: float = 400.0, alpha_bar: float = 0.4, scale: float = 7.5) -> State:
    n = len(prompts)
    x_t = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    uncond, cond = embed("").expand(n), Conditioning.join([embed(p) for p in prompts])
    eps_uncond, eps_cond = denoise(x_t, uncond), denoise(x_t, cond)
    run = Run(n, 1000, decode, lambda texts: Conditioning.join([embed(text) for text in texts]))
    eps_hat = eps_uncond + scale * (eps_cond - eps_uncond)
    at = Coefficients.of_alpha_bar(alpha_bar)
    return State(run, 0, t, at, scale, x_t, eps_uncond, eps_cond, eps_hat, uncond, cond, denoise)


def index_near(state: State, image: int, cosine: float, slope: float = 1.0) -> Index:
    """Sample 0 lies at ``cosine`` from one image's ``x̂_0`` and at 0.05 from the others', sample 1 at 0."""
    features = Embedder().features(decode(state.x0()))
    wanted = torch.full((len(features),), 0.05)
    wanted[image] = cosine
    near = torch.linalg.pinv(features) @ wanted
    aside = torch.linalg.svd(features)[2][len(features) :]
    near = near + (1 - near.norm() ** 2).sqrt() * aside[0]
    return Index(torch.stack([near, aside[1]]), ["a known cat", "another"], [3, 1], slope)


def act(state: State, amg: AMG):
    eps_hat, parts, columns = guide([(amg.name, amg.start(state.run))], state)
    return eps_hat, parts, columns


def only(**switches: bool) -> dict[str, bool]:
    names = ("despecification", "deduplication", "dissimilarity")
    return {name: switches.get(name, False) for name in names}


def analytic_gradient(state: State, eps_hat: Tensor, target: Tensor, image: int = 0) -> tuple[float, Tensor]:
    """Cosine to ``target`` and its gradient by ``x_t`` with ``ε̂`` held fixed, from the closed forms."""
    x0 = (state.x_t[image] - math.sqrt(1 - state.alpha_bar) * eps_hat[image]) / math.sqrt(state.alpha_bar)
    f = TO_FEATURES @ (0.1 * x0[:3]).flatten()
    unit = f / f.norm()
    cosine = unit @ target
    by_x0 = 0.1 * TO_FEATURES.T @ (target - cosine * unit) / f.norm()
    gradient = torch.zeros_like(x0)
    gradient[:3] = by_x0.view(3, 8, 8) / math.sqrt(state.alpha_bar)
    return float(cosine), gradient
