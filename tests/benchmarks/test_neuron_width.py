"""Widening the sample model's UNet keeps what it computes, and gives a channel's copies weights of their own."""

from __future__ import annotations

import pytest
import torch

from benchmarks.neuron_width import divided, widened
from train.denoising.opening.loading import load_pipeline, sample_model_dir


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_widened_unet_computes_the_same(width):
    unet = load_pipeline(str(sample_model_dir())).unet
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(3, 4, 16, 16, generator=generator), torch.randn(3, 32, 128, generator=generator)
    t = torch.tensor([1, 500, 999])
    wide = widened(unet, width)
    with torch.no_grad():
        expected, found = (one(x, t, encoder_hidden_states=e, return_dict=False)[0] for one in (unet, wide))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert list(wide.config.block_out_channels) == [width * channels for channels in unet.config.block_out_channels]


def test_parts_of_a_weight_differ_and_add_up_to_it():
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    parts = divided(weight, 3, torch.Generator().manual_seed(1)).unflatten(1, (4, 3))
    torch.testing.assert_close(parts.sum(2), weight)
    assert (parts[:, :, 0] - parts[:, :, 1]).abs().mean() > 0.3
