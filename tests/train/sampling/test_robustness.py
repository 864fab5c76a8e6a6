"""What goes wrong in use: half precision, memory, an index without rows, predictions that are no numbers."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from afresh.errors import UserError
from curate.embed.registry import load_embedder
from curate.index.training_index import TrainingIndex
from train.sample_model.small import tiny_pipeline
from train.sampling.config import SampleConfig
from train.sampling.job.job import run_sample
from train.sampling.pipelines.stable_diffusion import GuidedStableDiffusion
from train.sampling.terms.amg import AMG
from train.sampling.terms.basin import AttractionBasin
from train.sampling.terms.initial_noise import NoiseAdjustment
from train.sampling.terms.prompt_embedding import PromptMinimisation

PROMPTS = ["red apple", "grinning face", "blue car"]
ALWAYS = {"schedule": "constant", "lambda_b": -1.0, "sim_form": "excess"}  # the released form's factor may be nought


def index_of(emoji, embedder) -> TrainingIndex:
    images, captions = zip(*emoji, strict=True)
    n = len(images)
    keys = [f"{i:04d}" for i in range(n)]
    return TrainingIndex.build(
        embedder.embed(images), captions, ["000000.tar"] * n, keys, np.ones(n, bool), np.arange(n), embedder.name
    )


@pytest.fixture(scope="module")
def detector():
    return load_embedder("copy-detector")


@pytest.fixture(scope="module")
def index(emoji, detector) -> TrainingIndex:
    return index_of(emoji, detector)


def draw(pipe: GuidedStableDiffusion, *guidance, steps: int = 3, **options):
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    options = {"output_type": "pt", "num_inference_steps": steps, **options}
    return pipe(PROMPTS, generator=generators, guidance=guidance, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_guided_through_a_float32_decoder(dtype, index, detector):
    pipe = GuidedStableDiffusion.from_pipe(tiny_pipeline().to(dtype))
    plain = draw(pipe)
    own: list[int] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, arguments: own.append(len(arguments[0])))
    guided = draw(pipe, AMG(index, detector, **ALWAYS))
    assert own == [len(PROMPTS)]  # the half-precision decoder draws the images, and guidance never sees it
    assert pipe.vae.dtype == dtype and guided.images.dtype == dtype
    assert guided.images.isfinite().all()
    assert (guided.images - plain.images).flatten(1).abs().amax(1).min() > 1e-2
    for row in guided.trace:
        assert "dissimilarity" in row["fired"]
        assert 0 < row["gradient_norm"] < float("inf")


def test_slices_bound_what_the_decoder_is_given_and_the_images_stay(index, detector):
    pipe = GuidedStableDiffusion.from_pipe(tiny_pipeline(seed=0))
    decoded: list[int] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, arguments: decoded.append(len(arguments[0])))
    images = {}
    for size in (8, 1):
        decoded.clear()
        images[size] = draw(pipe, AMG(index, detector, edits=1, decode_slice=size, **ALWAYS)).images
        assert max(decoded[:-1]) == min(size, len(PROMPTS))  # the last call is the pipeline's own
    # Kernels round otherwise in a batch of another size, so the last bits of images that are guided may differ.
    torch.testing.assert_close(images[1], images[8], rtol=0, atol=1e-4)


@pytest.fixture
def broken():
    """A pipeline whose UNet gives no number for the second image, from its second step on."""
    pipe = GuidedStableDiffusion.from_pipe(tiny_pipeline(seed=0))
    calls = []

    def overflow(module, arguments, output):
        calls.append(len(output[0]))
        if len(calls) > 1 and len(output[0]) == 2 * len(PROMPTS):
            output[0][[1, 1 + len(PROMPTS)]] = torch.nan
        return output

    pipe.unet.register_forward_hook(overflow)
    return pipe


@pytest.mark.parametrize(
    "term",
    [None, "amg", AttractionBasin(), NoiseAdjustment(method="batch"), PromptMinimisation(target=0.0, steps=1)],
    ids=["none", "amg", "basin", "noise", "prompt"],
)
def test_an_image_that_is_no_number_is_named_and_leaves_the_others(broken, index, detector, caplog, term):
    guidance = [AMG(index, detector, **ALWAYS) if term == "amg" else term] if term is not None else []
    expected = draw(GuidedStableDiffusion.from_pipe(tiny_pipeline(seed=0)), *guidance)
    with caplog.at_level(logging.WARNING):
        output = draw(broken, *guidance)
    assert torch.equal(output.images[[0, 2]], expected.images[[0, 2]])
    (message,) = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert "image 2 of the batch ('grinning face')" in message and "model's output" in message


def test_guidance_that_is_no_number_is_told_from_the_model(tiny_pipe, index, detector, caplog):
    pipe = GuidedStableDiffusion.from_pipe(tiny_pipe)
    with caplog.at_level(logging.WARNING):
        draw(pipe, AMG(index, detector, c_3=float("nan"), **ALWAYS), steps=1)
    messages = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert len(messages) == len(PROMPTS) and "the guided prediction" in messages[0]


def test_an_index_without_rows_is_refused_before_anything_is_drawn(tiny_pipe, emoji, detector, tmp_path):
    empty = index_of(emoji, detector)
    names = ("embeddings", "captions", "shards", "keys", "kept", "group")
    empty = replace(empty, **{name: getattr(empty, name)[:0] for name in names})
    with pytest.raises(UserError, match="empty"):
        AMG(empty, detector)
    empty.save(tmp_path / "curated" / "index")
    tiny_pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("red apple\n")
    config = SampleConfig(
        str(tmp_path / "model"), str(tmp_path / "prompts.txt"), str(tmp_path / "out"),
        index=str(tmp_path / "curated"), seeds=1, steps=1, device="cpu",
    )  # fmt: skip
    for guidance in ("none", "amg", "rejection"):
        with pytest.raises(UserError, match="curated is empty"):
            run_sample(replace(config, guidance=guidance))
    assert not list(Path(config.out).glob("*.png"))
