"""Preprocessing: what a model's own image processor does to an image, from its file alone, and in torch the same."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from afresh.errors import UserError
from curate.embed.preprocessing import Preprocessing, read_processor

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def pictures():
    """Of several shapes, some smaller than what is asked for, with odd margins among them."""
    rng = np.random.default_rng(0)
    shapes = ((40, 40), (97, 33), (33, 97), (61, 50), (300, 201), (20, 16), (640, 41))
    coarse = [Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)) for _ in shapes]
    return [image.resize(shape, Image.Resampling.BICUBIC) for image, shape in zip(coarse, shapes, strict=True)]


def prepared(preprocessing: Preprocessing, image: Image.Image) -> np.ndarray:
    ((places, stack),) = preprocessing.stacks([image])
    assert places == [0]
    return preprocessing.normalised(torch.from_numpy(stack)).numpy()[0]


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32, image_mean=MEAN, image_std=STD),
        CLIPImageProcessorPil(size={"shortest_edge": 39}, crop_size=32, resample=2, image_mean=MEAN, image_std=STD),
        BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=28, image_mean=MEAN, image_std=STD),
        SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD),
        SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=1, do_normalize=False),
    ],
    ids=["clip", "clip-crop-bilinear", "dinov2", "siglip", "lanczos"],
)
def test_images_are_prepared_as_the_models_own_processor_does_it(processor, pictures, tmp_path):
    processor.save_pretrained(tmp_path)
    preprocessing = read_processor(tmp_path)
    for image in pictures:
        official = np.asarray(processor(image)["pixel_values"][0])
        np.testing.assert_allclose(prepared(preprocessing, image), official, atol=2e-6)


def test_older_and_newer_files_are_understood(tmp_path, pictures):
    # As the first CLIP models have it: bare numbers, no rescaling.
    older = {"do_resize": True, "size": 32, "resample": 3, "do_center_crop": True, "crop_size": 30,
             "do_normalize": True, "image_mean": MEAN, "image_std": STD}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    expected = Preprocessing(32, fit="shortest", crop=30, mean=MEAN, std=STD)
    assert read_processor(tmp_path) == expected
    newer = {"image_processor": older | {"size": {"shortest_edge": 32}}, "processor_class": "CLIPProcessor"}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(newer))
    assert read_processor(tmp_path) == expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"do_resize": False}, "do_resize: false is not supported"),
        ({"do_pad": True}, "do_pad: true is not supported"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"resample": 0}, "resample: 0 is not supported"),
        ({"size": {"height": 32, "width": 48}}, '"width": 48'),
        ({"size": {"longest_edge": 32}}, "longest_edge"),
        ({"image_mean": [0.5]}, "no three numbers"),
        ({"image_mean": None}, "no three numbers"),
        ({"do_center_crop": True, "crop_size": 64}, "a crop of 64 pixels cannot be cut from 32"),
    ],
)
def test_what_is_not_supported_is_refused_by_file_and_key(change, complaint, tmp_path):
    fields = {"size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD} | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=rf"preprocessor_config\.json.*{complaint}"):
        read_processor(tmp_path)


def test_a_missing_or_malformed_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
        read_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 3')
    with pytest.raises(UserError, match=r"preprocessor_config\.json cannot be read"):
        read_processor(tmp_path)


@pytest.mark.parametrize("fit", ["squash", "shortest"])
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [None, 32])
def test_torch_pixels_are_prepared_like_pil_images(fit, filter, crop, pictures):
    preprocessing = Preprocessing(37, fit=fit, crop=crop, filter=filter, mean=MEAN, std=STD)
    for image in pictures:
        ((_, stack),) = preprocessing.stacks([image])
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None].requires_grad_(True)
        resized = preprocessing.resized(pixels)
        assert np.abs(resized.detach().numpy() - stack).max() < 3 / 255  # 8 bits, rounded twice
        (gradient,) = torch.autograd.grad(resized.sum(), pixels)
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_a_whole_image_keeps_its_shape_and_shapes_are_grouped(pictures):
    preprocessing = Preprocessing(32, fit="shortest")
    groups = preprocessing.stacks([pictures[0], pictures[1], pictures[0], pictures[2]])
    assert {stack.shape[1:]: places for places, stack in groups} == {
        (3, 32, 32): [0, 2],
        (3, 32, 94): [1],
        (3, 94, 32): [3],
    }


def test_a_line_of_pixels_does_not_become_gigabytes():
    line = Image.new("RGB", (40_000, 1))
    ((_, stack),) = Preprocessing(64, fit="shortest").stacks([line])
    assert stack.shape == (1, 3, 64, 8 * 64)
    assert Preprocessing(64, fit="shortest", crop=64).resized(torch.zeros(1, 3, 40_000, 1)).shape == (1, 3, 64, 64)


def test_an_odd_margin_is_halved_as_each_library_does_it():
    image = Image.fromarray(np.arange(35 * 35, dtype=np.uint16).astype(np.uint8).reshape(35, 35)).convert("RGB")
    whole = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)
    for rounds, start in ((False, 1), (True, 2)):
        ((_, stack),) = Preprocessing(35, crop=32, rounds=rounds).stacks([image])
        np.testing.assert_array_equal(stack[0], whole[:, start : start + 32, start : start + 32])
