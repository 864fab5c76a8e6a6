"""Structural similarity: the plain formula, windows that fit small images, and the scaling of channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.memorization.signals.ssim import ms_ssim, rescaled, windows


def plain_ms_ssim(x: np.ndarray, y: np.ndarray, windows: list[int]) -> float:
    """Window by window, in float64: ``x`` and ``y`` ``[c, h, w]``."""
    result = 1.0
    for scale, side in enumerate(windows):
        offsets = np.arange(side) - side // 2
        weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
        weights /= weights.sum()
        terms = []
        for a, b in zip(x, y, strict=True):
            for i in range(a.shape[0] - side + 1):
                for j in range(a.shape[1] - side + 1):
                    p, q = a[i : i + side, j : j + side], b[i : i + side, j : j + side]
                    mu_p, mu_q = (weights * p).sum(), (weights * q).sum()
                    var_p, var_q = (weights * (p - mu_p) ** 2).sum(), (weights * (q - mu_q) ** 2).sum()
                    cov = (weights * (p - mu_p) * (q - mu_q)).sum()
                    term = (2 * cov + 0.03**2) / (var_p + var_q + 0.03**2)
                    if scale + 1 == len(windows):
                        term *= (2 * mu_p * mu_q + 0.01**2) / (mu_p**2 + mu_q**2 + 0.01**2)
                    terms.append(term)
        result *= max(np.mean(terms), 0) ** 0.33
        x, y = (z.reshape(z.shape[0], z.shape[1] // 2, 2, z.shape[2] // 2, 2).mean((2, 4)) for z in (x, y))
    return result


@pytest.mark.parametrize(
    ("side", "sizes"), [(128, [11, 11, 11]), (64, [11, 11, 11]), (32, [11, 11, 7]), (16, [11, 7, 3]), (8, [7, 3])]
)
def test_windows_fit_their_scales(side, sizes):
    assert windows(side) == sizes


@pytest.mark.parametrize("side", [64, 16, 8])
def test_ms_ssim_is_the_plain_formula(side):
    rng = np.random.default_rng(side)
    x = rng.random((2, side, side))
    y = 0.7 * x + 0.3 * rng.random((2, side, side))
    found = ms_ssim(torch.from_numpy(x[None]), torch.from_numpy(y[None]))
    assert found.item() == pytest.approx(plain_ms_ssim(x, y, windows(side)), abs=1e-4)
    assert 0.3 < found.item() < 0.99


def test_ms_ssim_is_one_for_equal_images_and_falls_with_noise():
    x = rescaled(torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    values = [ms_ssim(x, (x + s * noise).clamp(0, 1)) for s in (0, 0.05, 0.2, 0.5)]
    assert values[0] == pytest.approx(torch.ones(3), abs=1e-5)
    assert all((later < earlier).all() for earlier, later in zip(values, values[1:], strict=False))


def test_ms_ssim_of_opposite_images_is_zero_and_too_small_ones_are_refused():
    x = torch.rand(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert ms_ssim(x, 1 - x).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="sides from 3"):
        ms_ssim(x[..., :2], x[..., :2])


def test_ms_ssim_of_constant_images_is_the_luminance_term():
    # without contrast, cs = 1 and l = (2ab + C_1) / (a² + b² + C_1)
    a, b = 0.2, 0.6
    x, y = torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b)
    expected = ((2 * a * b + 1e-4) / (a * a + b * b + 1e-4)) ** 0.33
    assert float(ms_ssim(x, y)) == pytest.approx(expected, rel=1e-3)


def test_channels_are_scaled_each_by_itself():
    scaled = rescaled(torch.tensor([[[[1.0, 3.0], [2.0, 5.0]], [[7.0, 7.0], [7.0, 7.0]]]]))
    assert scaled[0, 0].tolist() == [[0.0, 0.5], [0.25, 1.0]]
    assert scaled[0, 1].tolist() == [[0.0, 0.0], [0.0, 0.0]]
