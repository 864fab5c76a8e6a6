"""The text-conditional noise magnitude, against numbers worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from train.denoising.coefficients import Coefficients
from train.denoising.predictions import to_eps
from train.memorization import magnitude


def test_is_the_distance_of_each_image_by_itself():
    cond, uncond = torch.zeros(3, 4, 2, 2), torch.zeros(3, 4, 2, 2)
    cond[0, 0, 0, 0], cond[1, 1] = 3.0, 2.0
    uncond[0, 3, 1, 1] = 4.0
    assert magnitude(cond, uncond).tolist() == pytest.approx([5.0, 4.0, 0.0])


def test_rms_does_not_depend_on_the_size_of_the_latents():
    for side in (4, 64):
        m = magnitude(torch.full((1, 4, side, side), 0.25), torch.zeros(1, 4, side, side), form="rms")
        assert m.item() == pytest.approx(0.25)


def test_half_precision_inputs_are_compared_in_float32():
    cond = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)
    m = magnitude(cond, torch.zeros_like(cond))
    assert m.dtype == torch.float32
    assert m.item() == pytest.approx(300 * 128)  # the sum of squares would not fit in half precision


def test_gradient_points_from_the_empty_prompt_to_the_prompt():
    cond = torch.tensor([[3.0, 4.0]], requires_grad=True)
    magnitude(cond, torch.zeros(1, 2)).sum().backward()
    assert cond.grad.tolist() == [pytest.approx([0.6, 0.8])]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="differ"):
        magnitude(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="form 'l1'"):
        magnitude(torch.zeros(1, 3), torch.zeros(1, 3), form="l1")


@pytest.mark.parametrize("per_image", [False, True])
def test_all_prediction_types_give_the_noise_that_was_added(per_image):
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    alpha_bar = torch.linspace(0.05, 0.95, 5) if per_image else torch.tensor(0.3)
    a = alpha_bar.reshape(-1, 1, 1, 1).sqrt()
    b = (1 - alpha_bar.reshape(-1, 1, 1, 1)).sqrt()
    x_t, v, at = a * x_0 + b * eps, a * eps - b * x_0, Coefficients(a, b)
    for output, kind in ((eps, "epsilon"), (v, "v_prediction"), (x_0, "sample")):
        assert torch.allclose(to_eps(output, x_t, at, kind), eps, atol=2e-5)
    with pytest.raises(ValueError, match="'score'"):
        to_eps(eps, x_t, at, "score")


@pytest.mark.parametrize(
    "first",
    [
        "import train.memorization.signals.magnitude",
        "from train.memorization.signals.magnitude import MeanMagnitude",
        "from train.memorization import magnitude",
    ],
)
def test_the_package_exports_the_function_whatever_is_imported_first(first):
    check = "from train.memorization import magnitude; assert callable(magnitude), magnitude"
    subprocess.run([sys.executable, "-c", f"{first}; {check}"], check=True)


def test_importing_the_package_does_not_load_torch():
    check = (
        "import train.memorization.config, train.evaluation.config, sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
