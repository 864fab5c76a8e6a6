"""The masked magnitude: its equation by hand, and the mask that the scoring loop gives it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.denoising.coefficients import Coefficients
from train.memorization import bright_ending, score
from train.memorization.signals.masked_magnitude import MaskedMagnitude
from train.memorization.signals.protocol import Seen

PROMPTS = ["red apple, food fruit", "flag"]


def seen(difference: Tensor, mask: Tensor | None = None) -> Seen:
    """A step at which the prompt makes this difference, ``[c, h, w]``."""
    eps_uncond = torch.ones(1, *difference.shape)
    at = Coefficients.of_alpha_bar(0.5)
    return Seen(eps_uncond, 1, at, eps_uncond + difference, eps_uncond, {}, False, None if mask is None else mask[None])


def combined(steps: list[Seen], form: str = "l2") -> float:
    signal = MaskedMagnitude(form)  # type: ignore[arg-type]
    return float(signal.combine(torch.stack([signal.observe(step) for step in steps], dim=1)))


def test_the_difference_is_weighed_by_the_last_mask_and_divided_by_its_mean():
    first, last = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    first[:, 0, 0], first[0, 1, 1] = torch.tensor([3.0, 4.0]), 100.0
    last[1, 0, 1] = 2.0
    mask = torch.tensor([[0.5, 0.25], [0.25, 0.0]])
    expected = (0.5 * 5.0 / 0.25 + 0.25 * 2.0 / 0.25) / 2  # where the mask is 0, 100 counts for nothing
    assert combined([seen(first), seen(last, mask)]) == pytest.approx(expected)
    assert combined([seen(first), seen(last, mask)], "rms") == pytest.approx(expected / 8**0.5)


def test_a_mask_of_one_value_gives_the_magnitude():
    difference = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert combined([seen(difference, torch.full((4, 4), 0.3))]) == pytest.approx(float(difference.norm()), rel=1e-5)


class Masks:
    """Keeps what the loop shows."""

    name, looks_at, noise_level = "masks", "every step", None
    unconditional = attention = compares_seeds = False
    end_attention = True

    def __init__(self) -> None:
        self.seen: list[Tensor | None] = []

    def observe(self, seen: Seen) -> Tensor:
        self.seen.append(seen.end_attention)
        return seen.x_t.flatten(1).norm(dim=1)

    def combine(self, observed: Tensor) -> Tensor:
        return observed[:, -1]

    def of_prompt(self, values: Tensor) -> Tensor:
        return values.mean()


def test_the_loop_shows_the_end_tokens_attention_at_the_last_step_alone(tiny_pipe):
    masks = Masks()
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    scores = score(tiny_pipe, PROMPTS, steps=3, seeds=[3], signals=[masks, "masked_magnitude", "magnitude"], **options)
    assert [mask is None for mask in masks.seen] == [True, True, False]
    drawn = bright_ending(tiny_pipe, PROMPTS, seeds=[3, 3], **options)
    torch.testing.assert_close(masks.seen[-1], torch.from_numpy(drawn.masks), rtol=1e-3, atol=1e-5)
    assert (scores.per_prompt("masked_magnitude") > 0).all()


def test_no_mask_is_computed_for_signals_that_do_not_look_at_it(tiny_pipe, monkeypatch):
    import train.memorization.scoring as scoring

    monkeypatch.setattr(scoring, "recorded_attention", None)
    assert score(tiny_pipe, PROMPTS, steps=2, seeds=1, signals=["magnitude"]).per_prompt().shape == (2,)
