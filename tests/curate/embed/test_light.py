"""Luminance, edges and chroma: what they forgive, what they do not, and that samplers see what curation saw."""

import numpy as np
import pytest
import torch
from PIL import Image

from curate.embed.light import LightEmbedder
from curate.embed.registry import load_embedder

NAMES = ("luminance", "edges", "chroma")


def image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """``[64, 64, 3]``: smooth colours and a dark square."""
    y, x = np.mgrid[0:64, 0:64] / 64
    pixels = np.stack([0.3 + 0.4 * x, 0.3 + 0.4 * y, 0.5 + 0 * x], 2)
    pixels[20:40, 12:36] = 0.2
    return pixels


@pytest.mark.parametrize("name", NAMES)
def test_contrast_and_brightness_are_forgiven_and_another_place_is_not(name, scene):
    embedder = load_embedder(name)
    assert isinstance(embedder, LightEmbedder) and embedder.name == name and name in embedder.digest
    one, faint, moved = embedder.embed([image(scene), image(0.3 + 0.5 * scene), image(np.roll(scene, 20, (0, 1)))])
    assert one.shape == (embedder.dim,)
    assert np.linalg.norm(one) == pytest.approx(1, abs=2e-2 if name == "chroma" else 1e-3)
    # An edge counts by its length beyond a hundredth, a colour by what it has above grey, so faint ones count less.
    assert one @ faint > {"luminance": 0.999, "edges": 0.98, "chroma": 0.95}[name]
    assert one @ moved < 0.6


def test_luminance_is_the_correlation_of_16_by_16_places(scene):
    other = np.random.default_rng(0).random((64, 64, 3))
    light = [np.asarray(image(p), np.float64) @ [0.299, 0.587, 0.114] for p in (scene, other)]
    small = [p.reshape(16, 4, 16, 4).mean((1, 3)).ravel() for p in light]
    one, two = load_embedder("luminance").embed([image(scene), image(other)])
    assert one @ two == pytest.approx(np.corrcoef(*small)[0, 1], abs=1e-4)


def test_edges_do_not_see_which_side_is_the_darker(scene):
    one, inverted = load_embedder("edges").embed([image(scene), image(1 - scene)])
    assert one @ inverted > 0.999
    one, inverted = load_embedder("luminance").embed([image(scene), image(1 - scene)])
    assert one @ inverted < -0.999


def test_chroma_sees_where_colours_lie_and_neither_light_nor_shade(scene):
    embedder = load_embedder("chroma")
    light = np.random.default_rng(0).random((64, 64, 1)) - 0.5
    one, shaded, swapped, grey, noise = embedder.embed(
        [
            image(scene),
            image(scene + 0.2 * light),
            image(scene[:, :, ::-1]),
            image(np.repeat(0.5 + light, 3, 2)),
            image(0.5 + 0.01 * np.random.default_rng(1).standard_normal((64, 64, 3))),
        ]
    )
    assert one @ shaded > 0.98 and one @ swapped < 0.8
    assert np.abs(grey).max() < 1e-4  # no colour is like nothing
    assert np.linalg.norm(noise) < 0.3  # nor is the noise of a grey image a colour


@pytest.mark.parametrize("name", NAMES)
def test_features_are_what_embed_gives_and_have_a_gradient_even_of_plain_images(name, scene):
    embedder = load_embedder(name)
    pixels = torch.tensor(np.asarray(image(scene), np.float32) / 255).permute(2, 0, 1)[None].requires_grad_()
    features = embedder.features(pixels)
    np.testing.assert_allclose(features.detach().numpy(), embedder.embed([image(scene)]), atol=1e-5)
    features[0, 7].backward()
    assert torch.isfinite(pixels.grad).all() and (pixels.grad != 0).any()
    plain = torch.full((1, 3, 128, 96), 0.5, requires_grad=True)
    features = embedder.features(plain)
    assert features.shape == (1, embedder.dim) and features.abs().max() < 1e-2
    features.sum().backward()
    assert torch.isfinite(plain.grad).all()
