"""Metrics whose weights are files: small models of the same form, against what they are defined as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from afresh.errors import UserError
from train.evaluation.judging.drawn import Drawn
from train.evaluation.judging.metrics import frechet_distance
from train.evaluation.metrics.clip import Clip
from train.evaluation.metrics.imagenet import ImageNetFeatures
from train.evaluation.metrics.inception import Inception
from train.evaluation.metrics.measuring import evaluate_images
from train.evaluation.metrics.protocol import Reference
from train.evaluation.metrics.sscd import SSCD


class Quarters(torch.nn.Module):
    """As SSCD's file is called: normalised pixels of any shape → a vector."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels, (4, 4)).flatten(1)


class Bytes(torch.nn.Module):
    """As Inception's file is called: pixels of 8 bits, and features on demand."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if images.dtype != torch.uint8 or not return_features:
            raise ValueError("pixels of 8 bits, and features, are asked for")
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, (2, 2)).flatten(1)


@pytest.fixture(scope="module")
def images(emoji) -> list[Image.Image]:
    return [image for image, _ in emoji]


@pytest.fixture(scope="module")
def drawn(emoji) -> Drawn:
    """Of six captions the own image and another one."""
    pairs = [(image, emoji[i][1]) for i in range(6) for image in (emoji[i][0], emoji[i + 20][0])]
    return Drawn("a", "none", "x", [image for image, _ in pairs], [caption for _, caption in pairs])


def test_sscd_gives_the_nearest_training_image_and_the_prompts_own_original(tmp_path, emoji, images, drawn):
    torch.jit.script(Quarters()).save(tmp_path / "sscd.pt")
    originals = {caption: [image] for image, caption in emoji[:6]}
    sscd = SSCD(Reference(images[:12], originals=originals, weights={"sscd": str(tmp_path / "sscd.pt")}))
    (one,) = evaluate_images([drawn], [sscd])
    assert one.images["sscd"][::2] == pytest.approx(np.ones(6), abs=1e-5)
    assert one.images["sscd_own"][::2] == pytest.approx(np.ones(6), abs=1e-5)
    assert (one.images["sscd_own"] <= one.images["sscd"] + 1e-6).all()
    assert one.row["sscd_share"] == pytest.approx(np.mean(one.images["sscd"] > 0.5))
    without = SSCD(Reference(images[:12], weights={"sscd": str(tmp_path / "sscd.pt")}))
    assert "sscd_own" not in evaluate_images([drawn], [without])[0].row


def test_fid_and_kid_stand_on_the_files_features_at_the_images_own_size(tmp_path, images, drawn):
    torch.jit.script(Bytes()).save(tmp_path / "inception.pt")
    some = [image if i % 3 else image.resize((80, 48)) for i, image in enumerate(images)]
    inception = Inception(Reference(held_out=some, weights={"inception": str(tmp_path / "inception.pt")}))

    def features(image):
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
        return torch.nn.functional.adaptive_avg_pool2d(pixels, (2, 2)).flatten().numpy()

    expected = np.stack([features(image) for image in some])
    assert inception.held_out == pytest.approx(expected, abs=1e-5)
    (one,) = evaluate_images([drawn], [inception])
    assert one.row["fid"] == pytest.approx(
        frechet_distance(np.stack([features(image) for image in drawn.images]), expected), rel=1e-4
    )
    assert one.row["kid_low"] < one.row["kid"] < one.row["kid_high"]


def test_another_file_than_inceptions_is_refused_by_name(tmp_path, images):
    torch.jit.script(Quarters()).save(tmp_path / "other.pt")
    (tmp_path / "no.pt").write_bytes(b"no program")
    for name, complaint in (("other.pt", "gives no features"), ("no.pt", "not a TorchScript file")):
        with pytest.raises(UserError, match=f"{name}: {complaint}"):
            Inception(Reference(held_out=images[:2], weights={"inception": str(tmp_path / name)}))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, tiny_pipe) -> Path:
    """A small CLIP of random weights, as transformers saves it."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = tiny_pipe.tokenizer
    text = {**width, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_dim": 24,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {**width, "image_size": 32, "patch_size": 8, "projection_dim": 24}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_that_transformers_gives_and_clip_fid_is_on_its_embeddings(clip_folder, images, drawn):
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(clip_folder)
    tokens = transformers.AutoTokenizer.from_pretrained(clip_folder)(
        drawn.captions, return_tensors="pt", padding="max_length", truncation=True, max_length=64
    )

    def embedded(some) -> torch.Tensor:
        pixels = processor(list(some), return_tensors="pt")["pixel_values"]
        return model.visual_projection(model.vision_model(pixels).pooler_output)

    with torch.no_grad():
        image, text = embedded(drawn.images), model.text_projection(model.text_model(**tokens).pooler_output)
        cosine = torch.nn.functional.cosine_similarity(image, text)
        expected = frechet_distance(image.numpy(), embedded(images).numpy())
    clip = Clip(Reference(held_out=images, weights={"clip": str(clip_folder)}))
    (one,) = evaluate_images([drawn], [clip])
    assert one.images["clip_score"] == pytest.approx(cosine.numpy(), abs=2e-3)
    assert one.row["clip_fid"] == pytest.approx(expected, rel=0.02)
    alone = Clip(Reference(weights={"clip": str(clip_folder)}))
    assert "clip_fid" not in evaluate_images([drawn], [alone])[0].row


def test_imagenet_features_do_not_depend_on_the_batch_and_coarse_ones_not_on_texture(images):
    features = ImageNetFeatures()
    together, alone = features(images[:20]), features(images[18:19])
    assert together.shape == (20, 1280)
    assert together[18] == pytest.approx(alone[0], abs=1e-3)
    assert features([]).shape == (0, 1280)

    def cosine(coarse: bool) -> float:
        rng = np.random.default_rng(0)
        noisy = [
            Image.fromarray((np.asarray(image) + rng.normal(0, 20, (64, 64, 3))).clip(0, 255).astype(np.uint8))
            for image in images[:12]
        ]
        a, b = features(images[:12], coarse=coarse), features(noisy, coarse=coarse)
        return float(np.mean(np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))

    assert cosine(coarse=True) > cosine(coarse=False)
