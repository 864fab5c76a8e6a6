"""Anti-memorization guidance in the pipeline: copies become something else, under every scheduler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.train.sampling.terms.known_parts import Index
from train.sampling.pipelines.stable_diffusion import GuidedStableDiffusion
from train.sampling.terms.amg import AMG


class Thumbnail:
    """Embeds an image as its 8×8 thumbnail, standardised."""

    name, dim, size = "linear", 192, 8

    def features(self, pixels: Tensor) -> Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(pixels, 8).flatten(1)
        return torch.nn.functional.normalize(small - small.mean(1, keepdim=True), dim=1)


@pytest.fixture(scope="module")
def copied(tiny_pipe):
    """A pipeline and an index that holds what it draws for seed 1, but nothing like seed 2."""
    pipe = GuidedStableDiffusion.from_pipe(tiny_pipe)
    call = {"num_inference_steps": 6, "output_type": "pt"}
    drawn = pipe(["red apple"], generator=[torch.Generator().manual_seed(1)], **call).images.float()
    noise = torch.randn(1, 192, generator=torch.Generator().manual_seed(0))
    index = Index(torch.cat([Thumbnail().features(drawn), noise]), ["red apple", "noise"], [30, 1])
    return pipe, index


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_it_draws_something_else_where_the_model_would_repeat_a_training_image(copied, scheduler):
    import diffusers

    pipe, index = copied
    kind = getattr(diffusers, scheduler)
    pipe = GuidedStableDiffusion.from_pipe(pipe, scheduler=kind.from_config(pipe.scheduler.config))
    call = {"num_inference_steps": 6, "output_type": "pt"}
    amg = AMG(index, Thumbnail(), schedule="constant", lambda_b=0.6, sim_offset=0.6, edits=1)

    def draw(seeds: list[int], **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(["red apple"] * len(seeds), generator=generators, **call, **options)

    plain, guided = draw([1, 2]), draw([1, 2], guidance=[amg])
    similarity = [
        float(index.search(Thumbnail().features(output.images[:1].float()).numpy(), 1)[0][0, 0])
        for output in (plain, guided)
    ]
    assert similarity[1] < similarity[0] - 0.04
    quiet = not any(row["fired"] for row in guided.trace if row["image"] == 1)
    if quiet:
        assert torch.equal(guided.images[1], plain.images[1])
    alone = draw([2], guidance=[amg]).images[0]
    torch.testing.assert_close(alone, guided.images[1], rtol=1e-3, atol=1e-3)
