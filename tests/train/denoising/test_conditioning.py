"""Conditioning as one thing: joined, sliced, padded, replaced."""

from __future__ import annotations

import pytest
import torch

from train.denoising.conditioning import Conditioning
from train.denoising.families.stable_diffusion import StableDiffusionDenoiser


def text(n: int, tokens: int, seed: int = 0, width: int = 32) -> Conditioning:
    return Conditioning({"embeds": torch.randn(n, tokens, width, generator=torch.Generator().manual_seed(seed))})


def test_equal_lengths_are_joined_without_a_mask_and_slices_give_them_back():
    a, b = text(2, 5), text(1, 5, seed=1)
    both = Conditioning.join([a, b])
    assert len(both) == 3 and both.parts.keys() == {"embeds"}
    assert torch.equal(both[:2].embeds, a.embeds) and torch.equal(both[torch.tensor([2])].embeds, b.embeds)


def test_the_shorter_of_two_is_padded_and_masked():
    both = Conditioning.join([text(1, 3), text(2, 5, seed=1)])
    assert both.tokens == 5
    assert both.parts["mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5, [True] * 5]


def test_padding_changes_no_image(tiny_pipe):
    denoiser = StableDiffusionDenoiser(tiny_pipe)
    short, long = text(1, 7), text(1, 16, seed=1)
    x_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together = denoiser(x_t, 500, Conditioning.join([short, long]))
        apart = torch.cat([denoiser(x_t[:1], 500, short), denoiser(x_t[1:], 500, long)])
        other = denoiser(x_t, 500, Conditioning.join([text(1, 7, seed=3), long]))
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], other[0], atol=1e-3)  # the prompt does matter


def test_a_replaced_caption_leaves_the_other_images_and_the_image_prompts():
    own = Conditioning({**text(3, 5).parts, "image_embeds.0": torch.arange(3.0)[:, None]})
    changed = own.put(torch.tensor([1]), text(1, 8, seed=1))
    assert changed.tokens == 8 and changed.parts["mask"].sum(1).tolist() == [5, 8, 5]
    assert torch.equal(changed[[0, 2]].embeds[:, :5], own[[0, 2]].embeds)
    assert torch.equal(changed.parts["image_embeds.0"], own.parts["image_embeds.0"])
    beside = text(3, 4, seed=2).beside(own)
    assert beside.tokens == 4 and torch.equal(beside.parts["image_embeds.0"], own.parts["image_embeds.0"])


def test_one_image_stands_for_many_and_others_are_refused():
    assert len(text(1, 5).expand(4)) == 4 and len(text(4, 5).expand(4)) == 4
    with pytest.raises(ValueError, match="2 images is none of 4"):
        text(2, 5).expand(4)
    with pytest.raises(ValueError, match="conditionings of"):
        Conditioning.join([text(1, 5), Conditioning({"labels": torch.zeros(1)})])
    with pytest.raises(ValueError, match="labels has no prompt embeddings"):
        Conditioning({"labels": torch.zeros(1)}).embeds  # noqa: B018


def test_dtypes_are_those_of_what_floats():
    moved = Conditioning({**text(1, 3).parts, "ids": torch.zeros(1, 3, dtype=torch.int64)}).to(dtype=torch.float16)
    assert moved.embeds.dtype == torch.float16 and moved.parts["ids"].dtype == torch.int64


def test_captions_are_compared_by_their_embeddings():
    a = text(2, 5)
    b = a.put(torch.tensor([0]), text(1, 5, seed=9))
    assert a.same_text(b).tolist() == [False, True]
    assert a.same_text(text(2, 6)).tolist() == [False, False]
