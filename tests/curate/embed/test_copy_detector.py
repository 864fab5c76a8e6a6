"""The carried copy detector: small; copies far above other images; no little noise talks it out of that."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from afresh.errors import UserError
from curate.embed.copy_detector import WEIGHTS, CopyDetector
from curate.embed.edits import EDITS
from curate.embed.registry import load_embedder
from curate.reading.images import decode_image, stack_images


@pytest.fixture(scope="module")
def held_out() -> list:
    """Images that the detector was not trained on."""
    from curate.sample_set import load_part

    return [decode_image(sample.image) for sample in load_part("held_out")]


@pytest.fixture(scope="module")
def measured() -> dict:
    return json.loads(WEIGHTS.with_suffix(".json").read_text())


def test_the_file_is_small_and_half_precision():
    assert WEIGHTS.stat().st_size < 3e6
    assert {value.dtype for value in load_file(str(WEIGHTS)).values()} == {torch.float16}


def test_unrelated_images_lie_near_0_and_copies_above_a_half(held_out):
    embedder = load_embedder("copy-detector")
    originals = embedder.embed(held_out)
    cosine = originals @ originals.T
    others = cosine[~np.eye(len(cosine), dtype=bool)]
    assert abs(others.mean()) < 0.1 and others.std() < 0.25
    rng = np.random.default_rng(0)
    for name in ("jpeg", "resize", "brightness", "contrast", "blur"):
        copies = (embedder.embed([EDITS[name](image, rng) for image in held_out]) * originals).sum(1)
        assert np.quantile(copies, 0.05) > 0.5, name


def test_the_carried_measurements_are_of_the_carried_weights(held_out, measured):
    embedder = load_embedder("copy-detector")
    rng = np.random.default_rng(measured["settings"]["seed"])
    first = next(iter(EDITS))
    copies = embedder.embed([EDITS[first](image, rng) for image in held_out])
    mean = (copies * embedder.embed(held_out)).sum(1).mean()
    assert float(mean) == pytest.approx(measured["copies"][first]["mean"], abs=2e-3)
    assert measured["parameters"] == sum(p.numel() for p in CopyDetector().parameters())


def test_small_changes_along_the_gradient_do_not_hide_a_copy(held_out, measured):
    model = CopyDetector.load()
    pixels = torch.from_numpy(stack_images(held_out[:16], model.size))
    target = model(pixels).detach()
    delta = torch.zeros_like(pixels)
    for _ in range(5):
        delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad((model((pixels + delta).clamp(0, 1)) * target).sum(), delta)
        delta = (delta.detach() - 2 / 255 * gradient.sign()).clamp(-4 / 255, 4 / 255)
    with torch.no_grad():
        similarity = (model((pixels + delta).clamp(0, 1)) * target).sum(1)
    assert similarity.mean() > 0.5


def test_weights_come_back_as_they_were_saved(tmp_path):
    torch.manual_seed(0)
    model = CopyDetector().eval()
    model.save(tmp_path / "x.safetensors")
    again = CopyDetector.load(tmp_path / "x.safetensors")
    pixels = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert ((model(pixels) * again(pixels)).sum(1) > 0.999).all()


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.safetensors cannot be loaded"):
        CopyDetector.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be loaded"):
        CopyDetector.load(tmp_path / "x.safetensors")
    from safetensors.torch import save_file

    save_file({"head.bias": torch.zeros(128)}, str(tmp_path / "part.safetensors"))
    with pytest.raises(UserError, match="does not hold the copy detector's weights: conv1.weight"):
        CopyDetector.load(tmp_path / "part.safetensors")
