"""Half precision: float32 unit rows all the same, near those of full precision. And memory that is too small."""


import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from afresh.errors import UserError
from curate.embed import registry
from curate.embed.preprocessing import Preprocessing
from curate.embed.registry import load_embedder
from curate.embed.torch_embedder import TorchEmbedder


def test_features_are_float32_inside_a_half_precision_sampler(models, images):
    embedder = load_embedder(str(models / "clip"))
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        plain = embedder.features(pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = embedder.features(pixels)
    assert torch.equal(plain, inside)


def test_half_precision_gives_float32_unit_rows_that_are_near(models, images):
    full, half = (load_embedder(str(models / "clip"), half=half).embed(images) for half in (False, True))
    assert half.dtype == np.float32 and not np.array_equal(full, half)
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(half, full, atol=5e-3)


def test_what_half_precision_cannot_hold_is_computed_again(images):
    class Steep(torch.nn.Module):
        """Beyond float16's range for bright images."""

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2, bias=False)
            self.linear.weight.data = torch.tensor([[6e4, 6e4, 0.0], [0.0, 1e4, 1e4]])

        def forward(self, x):
            return self.linear(x.mean(dim=(2, 3)))

    some = [Image.new("RGB", (8, 8), colour) for colour in ("white", (20, 10, 30), (250, 250, 0))]
    full, half = (
        TorchEmbedder("steep", Steep(), dim=2, preprocessing=Preprocessing(8), half=half).embed(some)
        for half in (False, True)
    )
    np.testing.assert_allclose(half, full, atol=2e-3)
    np.testing.assert_allclose(half[0], full[0], atol=1e-6)
    assert np.abs(half[1] - full[1]).max() > 1e-6  # in half precision indeed


class Small(torch.nn.Module):
    """Means of the colours, on a GPU that holds so many images at a time."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.seen = room, []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.mean(dim=(2, 3))


def test_what_a_gpu_does_not_hold_is_embedded_by_halves_from_then_on():
    some = [Image.new("RGB", (8, 8), (10 * n + 1, 250 - 9 * n, 40)) for n in range(20)]
    whole, small = (
        TorchEmbedder("small", Small(room), dim=3, preprocessing=Preprocessing(8)) for room in (100, 3)
    )
    np.testing.assert_allclose(small.embed(some, batch_size=16), whole.embed(some), atol=1e-6)
    assert small.model.seen == [16, 8, 4, *[2] * 10]
    small.model.seen.clear()
    small.embed(some[:4])
    assert small.model.seen == [2, 2]
    with pytest.raises(UserError, match="small: the GPU's memory does not hold the network and one image.*gpu_share"):
        TorchEmbedder("small", Small(0), dim=3, preprocessing=Preprocessing(8)).embed(some)


@pytest.mark.parametrize("load", ["load_embedder", "load_caption_embedder"])
def test_a_model_that_embeds_nothing_takes_no_gpu(load, models, images, monkeypatch):
    went: list[torch.device] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: went.append(torch.device(device)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as if there were one
    embedder = getattr(registry, load)(str(models / "clip"))
    assert embedder.digest and embedder.dim and not went
    with contextlib.suppress(Exception):  # there is none
        embedder.embed(images if load == "load_embedder" else ["a cat"])
    assert went[-1].type == "cuda"


@pytest.mark.parametrize("first", ["embed", "features"])
def test_gradients_run_through_a_model_that_went_to_its_device_in_inference_mode(first, images):
    """The device is meta, which has no numbers but moves weights as a GPU does."""
    embedder = TorchEmbedder("linear", torch.nn.Conv2d(3, 3, 8), dim=3, preprocessing=Preprocessing(8))
    embedder._device = torch.device("meta")
    pixels = torch.zeros(1, 3, 8, 8, device="meta")
    with torch.inference_mode(), contextlib.suppress(RuntimeError):  # of what meta cannot do
        embedder.embed(images[:1]) if first == "embed" else embedder.features(pixels)
    weights = list(embedder.model.parameters())
    assert all(weight.device.type == "meta" and not weight.is_inference() for weight in weights)
