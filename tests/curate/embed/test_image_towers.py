"""Image towers of other libraries: their own vectors, through one protocol."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from afresh.errors import UsageError, UserError
from curate.embed.registry import load_embedder
from tests.curate.embed.made_models import without


def official_vectors(folder: Path, images: list) -> torch.Tensor:
    """As the library's documentation does it: its processor, its model."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    processors = {"C": CLIPImageProcessorPil, "S": SiglipImageProcessorPil, "D": BitImageProcessorPil}
    pixels = processors[kind[0]].from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            answer = model.get_image_features(pixels).pooler_output
        else:
            answer = model(pixels)
            answer = getattr(answer, "image_embeds", None) if "Projection" in kind else answer.pooler_output
    return torch.nn.functional.normalize(answer, dim=1)


TOWERS = ["clip", "clip-vision", "clip-vision-projected", "siglip", "siglip-vision", "dinov2", "dinov3", "registers"]


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_gives_the_librarys_own_vectors(name, models, images):
    embedder = load_embedder(f"transformers:{models / name}")
    rows = embedder.embed(images)
    assert rows.dtype == np.float32 and rows.shape == (12, embedder.dim) and embedder.size == 32
    assert embedder.name == f"transformers:{models / name}"
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(rows, official_vectors(models / name, images).numpy(), atol=2e-6)
    assert (rows @ rows.T)[~np.eye(12, dtype=bool)].min() < 0.999  # images do differ


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_rows_do_not_depend_on_their_neighbours(name, models, images):
    embedder = load_embedder(str(models / name))
    whole = embedder.embed(images)
    np.testing.assert_allclose(embedder.embed(images, batch_size=5), whole, atol=1e-6)
    np.testing.assert_allclose(embedder.embed(images[::-1])[::-1], whole, atol=1e-6)
    np.testing.assert_allclose(embedder.embed(images[7:8])[0], whole[7], atol=1e-6)
    assert embedder.embed([]).shape == (0, embedder.dim)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_features_are_embed_on_the_same_pixels_and_have_a_gradient(name, models, images):
    embedder = load_embedder(str(models / name))
    for some in (images[:1], images[3:4]):
        pixels = torch.from_numpy(np.asarray(some[0], np.float32) / 255).permute(2, 0, 1)[None].requires_grad_(True)
        features = embedder.features(pixels)
        assert features.dtype == torch.float32
        assert float((features.detach().numpy() * embedder.embed(some)).sum()) > 0.999
        target = torch.from_numpy(embedder.embed(images[5:6]))
        (gradient,) = torch.autograd.grad((features * target).sum(), pixels)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    exact = torch.from_numpy(np.stack([np.asarray(image.resize((32, 32)), np.float32) for image in images]) / 255)
    if name == "siglip":  # squares of its size pass through untouched
        with torch.no_grad():
            features = embedder.features(exact.permute(0, 3, 1, 2)).numpy()
        rows = embedder.embed([image.resize((32, 32)) for image in images])
        np.testing.assert_allclose(features, rows, atol=1e-6)


def test_the_digest_follows_weights_config_and_preprocessing_but_not_the_folder(models, tmp_path):
    def digest(folder: Path) -> str:
        return load_embedder(str(folder)).digest

    original = digest(models / "clip")
    moved = without(models / "clip", tmp_path / "moved")
    assert digest(moved) == original
    processor = json.loads((moved / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").write_text(json.dumps(processor | {"resample": 2}))
    assert digest(moved) != original
    other = without(models / "clip", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (other / "config.json").write_text(json.dumps(config))
    assert digest(other) != original
    trained = without(models / "clip", tmp_path / "trained")
    weights = load_file(trained / "model.safetensors")
    weights["visual_projection.weight"][0, 0] += 1e-3
    save_file(weights, trained / "model.safetensors", {"format": "pt"})
    assert digest(trained) != original


def test_a_timm_folder_is_prepared_and_embedded_as_timm_does_it(tmp_path, images):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    for arch, options in (
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "num_heads": 1, "embed_dim": 16}),
        ("resnet10t", {"num_classes": 5}),
    ):
        settings = {"input_size": (3, 32, 32), "crop_pct": 0.9, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3)}
        model = timm.create_model(arch, pretrained_cfg_overlay=settings, **options).eval()
        folder = tmp_path / arch
        timm.models.save_for_hf(model, folder, model_args=options, safe_serialization=True)
        embedder = load_embedder(str(folder))
        assert load_embedder(f"timm:{folder}").digest == embedder.digest
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        with torch.no_grad():
            bare = torch.stack([transform(image) for image in images])
            official = model.forward_head(model.forward_features(bare), pre_logits=True)
            official = torch.nn.functional.normalize(official, dim=1)
        rows = embedder.embed(images)
        assert rows.shape == (12, model.num_features)
        np.testing.assert_allclose(rows, official.numpy(), atol=2e-5)
        pixels = torch.rand(2, 3, 50, 40, requires_grad=True)
        (gradient,) = torch.autograd.grad((embedder.features(pixels) * torch.randn(embedder.dim)).sum(), pixels)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    weights = load_file(folder / "model.safetensors")
    partial = without(folder, tmp_path / "partial")
    del weights["bn1.running_mean"]
    save_file(weights, partial / "model.safetensors")
    with pytest.raises(UserError, match="partial lacks weights of its image tower, such as bn1.running_mean"):
        load_embedder(f"timm:{partial}")
    lacking = without(folder, tmp_path / "lacking", "model.safetensors")
    with pytest.raises(UserError, match=r"has no model\.safetensors, its weights"):
        load_embedder(f"timm:{lacking}")


def test_timm_names_that_are_unknown_or_cannot_be_had_are_one_line():
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match="timm:resnet18.no_such_tag: Invalid pretrained tag"):
        load_embedder("timm:resnet18.no_such_tag")
    with pytest.raises(UsageError, match="timm:no_such_model: no folder here, and timm knows no weights"):
        load_embedder("timm:no_such_model")
    with pytest.raises(UsageError, match="timm/resnet18.a1_in1k: no folder here, not in the hub's cache"):
        load_embedder("timm:resnet18.a1_in1k")


@pytest.mark.parametrize("fit", ["shortest", "squash"])
def test_an_open_clip_folder_is_prepared_and_embedded_as_open_clip_does_it(fit, tmp_path, images):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    config = {
        "model_cfg": {
            "embed_dim": 24,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
            "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3], "interpolation": "bicubic",
                           "resize_mode": fit},
    }  # fmt: skip
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    made = open_clip.model.CLIP(**config["model_cfg"])
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    with torch.no_grad():
        official = model.eval().encode_image(torch.stack([transform(image) for image in images]), normalize=True)
    embedder = load_embedder(str(tmp_path))
    rows = embedder.embed(images)
    np.testing.assert_allclose(rows, official.numpy(), atol=2e-5)
    assert load_embedder(f"open_clip:{tmp_path}").digest == embedder.digest
    pixels = torch.rand(2, 3, 50, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad((embedder.features(pixels) * torch.randn(embedder.dim)).sum(), pixels)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    weights = made.state_dict()
    save_file({key: weights[key].contiguous() for key in list(weights)[1:]}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="cannot be loaded as"):
        load_embedder(f"open_clip:{tmp_path}")
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no open_clip_model\.safetensors, its weights"):
        load_embedder(f"open_clip:{tmp_path}")


def test_open_clip_names_that_are_unknown_or_cannot_be_had_are_one_line(tmp_path):
    pytest.importorskip("open_clip")
    for name, complaint in (
        ("open_clip:ViT-B-32", "name the architecture and its weights"),
        ("open_clip:ViT-B-32/no_such_tag", "no tag of ViT-B-32 .which has: openai, "),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "no folder here, not in the hub's cache"),
        ("open_clip:nobody/nothing", "no folder here, not in the hub's cache"),
    ):
        with pytest.raises(UsageError, match=complaint):
            load_embedder(name)
    with pytest.raises(UserError, match=r"has no open_clip_model\.safetensors"):
        load_embedder(f"open_clip:ViT-B-32/{tmp_path}")
