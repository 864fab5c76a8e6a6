"""The statistic on velocities, against data that is known in closed form under flow matching."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from afresh.files import write_json
from tests.train.families import tiny_sd3
from train.denoising.families.registry import denoiser_of
from train.denoising.schedules import FlowSchedule
from train.memorization import explain, score
from train.memorization.signals.magnitude import magnitude
from train.memorization.thresholds import Thresholds, read_thresholds
from train.sampling.pipelines.registry import guided

SHAPE, S = (4, 16, 16), 0.3
LEVELS = [1.0, 0.93, 0.5, 0.04]


def velocity(x_t: Tensor, means: Tensor, s: float, sigma: float) -> Tensor:
    """``E[ε − x_0 | x_t]`` of ``x_t = (1−σ) x_0 + σ ε``, ``x_0 ~ Σ_k N(μ_k, s²) / K``: ``[c, h, w]`` of ``means [K,
    …]``.

    With ``w² = (1−σ)² s² + σ²`` and ``a_k = x_t − (1−σ) μ_k``, component k is likely as ``exp(−‖a_k‖² / 2w²)``, and in
    it ``ε̂ = σ a_k / w²`` and ``x̂_0 = μ_k + (1−σ) s² a_k / w²``.
    """
    w2 = (1 - sigma) ** 2 * s**2 + sigma**2
    away = x_t - (1 - sigma) * means
    likely = (-away.flatten(1).square().sum(1) / (2 * w2)).softmax(0)
    return torch.einsum("k,kchw->chw", likely, (sigma - (1 - sigma) * s**2) * away / w2 - means)


class KnownTransformer(torch.nn.Module):
    """The exact velocity of ``N(μ(e), s²)`` with ``μ`` linear in the first tokens' embeddings, or of a mixture."""

    def __init__(self, like, means: Tensor | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(**like.config)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.means = means
        width = like.config.joint_attention_dim
        weight = torch.randn(3, width, *SHAPE, generator=torch.Generator().manual_seed(5)) / width
        self.register_buffer("weight", weight)

    def mean(self, embeds: Tensor) -> Tensor:
        return torch.einsum("ntd,tdchw->nchw", embeds[:, :3].double(), self.weight.double())

    def forward(self, hidden_states, timestep, encoder_hidden_states, **_: object) -> tuple[Tensor]:
        rows = []
        for x_t, t, mean in zip(hidden_states.double(), timestep, self.mean(encoder_hidden_states), strict=True):
            means = mean[None] if self.means is None else self.means.double()
            rows.append(velocity(x_t, means, S, float(t) / 1000))
        return (torch.stack(rows).float(),)


@pytest.fixture
def pipe():
    pipe = tiny_sd3()
    pipe.transformer = KnownTransformer(pipe.transformer)
    return pipe


@pytest.mark.parametrize("sigma", LEVELS)
def test_velocity_noise_and_sample_of_a_mixture_are_the_formulas(pipe, sigma):
    g = torch.Generator().manual_seed(0)
    means = torch.randn(2, *SHAPE, generator=g) * 0.1
    pipe.transformer.means = means
    denoiser = denoiser_of(pipe)
    assert type(denoiser.schedule) is FlowSchedule
    x_t = torch.randn(1, *SHAPE, generator=g)
    found = denoiser.predict(x_t, 1000 * sigma, denoiser.encode(["red apple"]))
    v = velocity(x_t[0].double(), means.double(), S, sigma).float()[None]
    torch.testing.assert_close(found.velocity, v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.compared, v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.x0, x_t - sigma * v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.eps, x_t + (1 - sigma) * v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", LEVELS)
def test_the_magnitude_on_velocities_is_that_of_the_samples_by_sigma_and_stands_at_pure_noise(pipe, sigma):
    denoiser = denoiser_of(pipe)
    x_t = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    cond, uncond = (denoiser.predict(x_t, 1000 * sigma, denoiser.encode([text])) for text in ("red apple", ""))
    m = magnitude(cond.compared, uncond.compared)
    means = [pipe.transformer.mean(denoiser.encode([text]).embeds) for text in ("red apple", "")]
    w2 = (1 - sigma) ** 2 * S**2 + sigma**2
    factor = 1 + (1 - sigma) * (sigma - (1 - sigma) * S**2) / w2  # ∂v/∂μ, up to its sign
    torch.testing.assert_close(m.double(), factor * (means[0] - means[1]).flatten(1).norm(dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m, magnitude(cond.x0, uncond.x0) / sigma, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(magnitude(cond.eps, uncond.eps), (1 - sigma) * m, rtol=1e-4, atol=1e-4)
    assert m > 0.1  # where ε-space has nothing to tell at σ = 1


def test_detection_and_token_gradients_at_the_first_step_are_the_formulas(pipe):
    denoiser = denoiser_of(pipe)
    scores = score(pipe, ["red apple"], steps=1, num_inference_steps=4, seeds=2)
    (own,), (empty,) = (pipe.transformer.mean(denoiser.encode([text]).embeds) for text in ("red apple", ""))
    expected = (own - empty).norm()  # σ = 1: v = x_t − μ
    assert scores.per_prompt()[0] == pytest.approx(float(expected), rel=1e-5)
    (found,) = explain(pipe, "red apple", steps=1, num_inference_steps=4, seeds=1)
    assert found.magnitude == pytest.approx(float(expected), rel=1e-5)
    direction = (own - empty) / expected
    gradients = torch.einsum("tdchw,chw->td", pipe.transformer.weight.double(), direction).norm(dim=1)
    assert found.per_token()[:3] == pytest.approx(gradients.tolist(), rel=1e-5)
    assert (found.per_token()[3:] == 0).all()
    assert len(found.tokens) == 16 + 256 and found.tokens[1].kind == "word"


def test_the_guided_pipelines_trace_has_the_same_magnitude(pipe):
    drawing = guided(pipe)
    trace = drawing("red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).trace
    expected = score(pipe, ["red apple"], steps=1, num_inference_steps=2, seeds=1).per_prompt()[0]
    assert trace[0]["magnitude"] == pytest.approx(float(expected), rel=1e-5)
    assert trace[0]["t"] == 1000 and trace[0]["alpha_bar"] == 0


def test_thresholds_of_one_space_are_no_thresholds_of_the_other(tmp_path):
    write_json(tmp_path / "memorization.json", {"form": "l2", "by_band": [1.0] * 10, "space": "velocity"})
    found = read_thresholds(tmp_path / "memorization.json")
    assert not found.unlike("", space="velocity")
    assert "magnitudes of velocity, and here they are of epsilon" in found.unlike("", space="v_prediction")
    assert not Thresholds.of(1.0, "l2").unlike("", space="velocity")  # a number that somebody gave
