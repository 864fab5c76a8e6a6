"""Image and text towers of other libraries: their own vectors, through one protocol, and one clear line when not."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from afresh.errors import UsageError, UserError
from curate.config import DedupConfig, SearchConfig
from curate.dedup import run_dedup
from curate.embed.preprocessing import Preprocessing
from curate.embed.registry import load_caption_embedder, load_embedder
from curate.embed.torch_embedder import TorchEmbedder
from curate.reading.writing import write_shard
from curate.search import run_search

ROOT = Path(__file__).resolve().parents[3]
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**WIDTHS, "image_size": 32, "patch_size": 8}
CLIP_SIZE = {"size": {"shortest_edge": 36}, "crop_size": 32}
SIGLIP_SIZE = {"size": {"height": 32, "width": 32}}
DINOV2_SIZE = {"size": {"shortest_edge": 40}, "crop_size": 32}


# ------------------------------------------------------------------------------- small models, as they are saved


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_pipe) -> Path:
    """Folders of small models with random weights: each library's own classes saved them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokens = {"vocab_size": len(tiny_pipe.tokenizer), "max_position_embeddings": 64,
              "bos_token_id": tiny_pipe.tokenizer.bos_token_id, "eos_token_id": tiny_pipe.tokenizer.eos_token_id,
              "pad_token_id": tiny_pipe.tokenizer.pad_token_id}  # fmt: skip
    clip_text, clip_vision = {**WIDTHS, **tokens, "projection_dim": 24}, {**VISION, "projection_dim": 24}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=clip_text, vision_config=clip_vision, projection_dim=24)
    )
    siglip_text = {**WIDTHS, **tokens, "projection_size": 32}
    siglip = transformers.SiglipModel(transformers.SiglipConfig(text_config=siglip_text, vision_config=VISION))
    dinov2 = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=8
    )
    registers = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=8
    )
    dinov3 = transformers.DINOv3ViTConfig(**WIDTHS, image_size=32, patch_size=8, num_register_tokens=2)
    parts = {
        "clip": (clip, CLIPImageProcessorPil(**CLIP_SIZE)),
        "clip-vision": (
            transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**clip_vision)),
            CLIPImageProcessorPil(**CLIP_SIZE),
        ),
        "clip-vision-projected": (
            transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**clip_vision)),
            CLIPImageProcessorPil(**CLIP_SIZE),
        ),
        "siglip": (siglip, SiglipImageProcessorPil(**SIGLIP_SIZE)),
        "siglip-vision": (
            transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
            SiglipImageProcessorPil(**SIGLIP_SIZE),
        ),
        "dinov2": (transformers.Dinov2Model(dinov2), BitImageProcessorPil(**DINOV2_SIZE)),
        "dinov3": (transformers.DINOv3ViTModel(dinov3), BitImageProcessorPil(**DINOV2_SIZE)),
        "registers": (transformers.Dinov2WithRegistersModel(registers), BitImageProcessorPil(**DINOV2_SIZE)),
    }
    for name, (model, processor) in parts.items():
        for parameter in model.parameters():  # initialised so small, every image would have the same vector
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    text = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**clip_text))
    text.save_pretrained(folder / "clip-text")
    bare = transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip_text))
    bare.save_pretrained(folder / "clip-text-bare")  # as Stable Diffusion has it
    for name in ("clip", "siglip", "clip-text", "clip-text-bare"):
        tiny_pipe.tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def images(emoji):
    """Of several shapes."""
    shapes = ((64, 64), (90, 64), (64, 71), (200, 180))
    return [image.resize(shapes[i % 4], Image.Resampling.LANCZOS) for i, (image, _) in enumerate(emoji[:12])]


def without(source: Path, target: Path, *names: str) -> Path:
    """A copy of a model folder that lacks some files."""
    shutil.copytree(source, target)
    for name in names:
        (target / name).unlink()
    return target


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


# ------------------------------------------------------------------------------------------------ image towers


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


def test_features_are_float32_inside_a_half_precision_sampler(models, images):
    embedder = load_embedder(str(models / "clip"))
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        plain = embedder.features(pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = embedder.features(pixels)
    assert torch.equal(plain, inside)


def test_half_precision_gives_float32_unit_rows_that_are_near(models, images):
    full, half = (load_embedder(str(models / "clip"), half=half).embed(images) for half in (False, True))
    assert half.dtype == np.float32 and not np.array_equal(full, half)
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(half, full, atol=5e-3)


def test_what_half_precision_cannot_hold_is_computed_again(images):
    class Steep(torch.nn.Module):
        """Beyond float16's range for bright images."""

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2, bias=False)
            self.linear.weight.data = torch.tensor([[6e4, 6e4, 0.0], [0.0, 1e4, 1e4]])

        def forward(self, x):
            return self.linear(x.mean(dim=(2, 3)))

    some = [Image.new("RGB", (8, 8), colour) for colour in ("white", (20, 10, 30), (250, 250, 0))]
    full, half = (
        TorchEmbedder("steep", Steep(), dim=2, preprocessing=Preprocessing(8), half=half).embed(some)
        for half in (False, True)
    )
    np.testing.assert_allclose(half, full, atol=2e-3)
    np.testing.assert_allclose(half[0], full[0], atol=1e-6)
    assert np.abs(half[1] - full[1]).max() > 1e-6  # in half precision indeed


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


@pytest.mark.parametrize(
    ("lacking", "complaint"),
    [
        ("config.json", r"is no model folder of transformers, timm, open_clip"),
        ("preprocessor_config.json", r"has no preprocessor_config\.json"),
        ("model.safetensors", r"has no weights as safetensors \(model\.safetensors\)"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_in_one_line(lacking, complaint, models, tmp_path):
    folder = without(models / "clip", tmp_path / "folder", lacking)
    with pytest.raises(UserError, match=rf"{folder.name}.*{complaint}") as caught:
        load_embedder(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_missing_weights_are_not_made_up(models, tmp_path):
    folder = without(models / "clip", tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of its image tower, such as visual_projection\.weight"):
        load_embedder(str(folder))
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickled")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_embedder(str(folder))


def test_pickled_weights_are_not_opened(models, tmp_path):
    folder = without(models / "clip", tmp_path / "folder", "model.safetensors")
    torch.save(transformers.CLIPModel.from_pretrained(models / "clip").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no weights as safetensors"):
        load_embedder(str(folder))


def test_models_of_other_kinds_and_input_sizes_are_refused(models, tmp_path):
    folder = without(models / "clip", tmp_path / "bert")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="no image tower is known of a model of type 'bert' .*clip, .*dinov2"):
        load_embedder(str(folder))
    folder = without(models / "clip", tmp_path / "larger")
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(UserError, match="does not take images of 48 pixels"):
        load_embedder(str(folder))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("transformers:nobody/no-such-model", "nobody/no-such-model: no folder here, not in the hub's cache"),
        ("transformers:/nowhere/model", "/nowhere/model: no such model folder"),
        ("transformers:./model", r"\./model: no such model folder"),
        ("transformers:", "unknown embedder 'transformers:'.*transformers:NAME"),
        ("keras:resnet", "unknown embedder 'keras:resnet'"),
    ],
)
def test_a_name_that_cannot_be_found_is_one_line(name, complaint):
    with pytest.raises(UsageError, match=complaint) as caught:
        load_embedder(name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_in_the_hubs_cache_is_found_offline(models, tmp_path):
    """Laid out as the hub's client caches it."""
    repository = tmp_path / "hub" / "models--somebody--clip"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(models / "clip", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    load = "from curate.embed.registry import load_embedder; e = load_embedder('transformers:somebody/clip')"
    code = f"{load}; print(e.name, e.dim)"
    done = python(code, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert done.stdout == "transformers:somebody/clip 24\n", done.stderr


# ------------------------------------------------------------------------------------------ packages not there


BLOCKER = """
import sys
class Blocked:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {blocked!r}:
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Blocked(finder) for finder in sys.meta_path]
"""


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}
    )


@pytest.mark.parametrize(
    ("call", "blocked", "complaint"),
    [
        ("load_embedder('timm:resnet18.a1_in1k')", "timm", r"timm is not installed: pip install 'afresh[timm]'"),
        ("load_embedder('open_clip:ViT-B-32/openai')", "open_clip",
         "open_clip is not installed: pip install 'afresh[clip]'"),
        ("load_caption_embedder('sentence-transformers:all-MiniLM-L6-v2')", "sentence_transformers",
         "sentence_transformers is not installed: pip install 'afresh[sentence-transformers]'"),
    ],
)  # fmt: skip
def test_a_missing_package_is_one_line_that_names_the_extra(call, blocked, complaint):
    code = (
        BLOCKER.format(blocked=[blocked])
        + f"""
from afresh.errors import UsageError
from curate.embed.registry import load_caption_embedder, load_embedder
try:
    {call}
except UsageError as error:
    print(error)
"""
    )
    done = python(code)
    assert done.stdout == complaint + "\n", done.stderr


@pytest.mark.parametrize(
    ("failure", "complaint"),
    [
        ("import torchvision_of_no_build", "(No module named 'torchvision_of_no_build'): pip install 'afresh[timm]'"),
        ("raise RuntimeError('operator torchvision::nms does not exist')",
         "(operator torchvision::nms does not exist): are torch and torchvision of the same build? "
         "pip install 'afresh[timm]'"),
    ],
)  # fmt: skip
def test_a_package_that_cannot_be_imported_says_why(failure, complaint, tmp_path):
    """With a torchvision that is missing, or built for another torch."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(failure)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from afresh.errors import UsageError
from curate.embed.registry import load_embedder
try:
    load_embedder("timm:resnet18.a1_in1k")
except UsageError as error:
    print(error)
"""
    done = python(code)
    assert done.stdout == f"timm cannot be imported {complaint}\n", done.stderr


def test_transformers_towers_need_no_torchvision(models):
    code = (
        BLOCKER.format(blocked=["torchvision"])
        + f"""
from PIL import Image
from curate.embed.registry import load_embedder
print(load_embedder({str(models / "siglip")!r}).embed([Image.new("RGB", (40, 50))]).shape)
"""
    )
    assert python(code).stdout == "(1, 32)\n"


# -------------------------------------------------------------------------------------------- timm, open_clip


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


# --------------------------------------------------------------------------------------------------- captions


CAPTIONS = ["a red apple", "a green apple on a table", "", "grinning face, " * 30, "日本語", "\ud800"]


@pytest.mark.parametrize("name", ["clip", "siglip", "clip-text", "clip-text-bare"])
def test_a_text_tower_gives_the_librarys_own_vectors(name, models):
    embedder = load_caption_embedder(f"transformers:{models / name}")
    rows = embedder.embed(CAPTIONS)
    assert rows.dtype == np.float32 and rows.shape == (6, embedder.dim)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embedder.embed(CAPTIONS[1:2])[0], rows[1], atol=1e-6)
    assert embedder.embed([]).shape == (0, embedder.dim)

    tokenizer = transformers.AutoTokenizer.from_pretrained(models / name)
    kind = json.loads((models / name / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(models / name).eval()
    tokens = tokenizer(CAPTIONS[:5], padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        if name == "clip-text":
            official = model(**tokens).text_embeds
        elif name == "clip-text-bare":
            official = model(**tokens).pooler_output
        elif name == "clip":
            official = model.get_text_features(**tokens).pooler_output
        else:  # its own tokenizer has no mask
            official = model.get_text_features(input_ids=tokens.input_ids).pooler_output
    np.testing.assert_allclose(rows[:5], torch.nn.functional.normalize(official, dim=1).numpy(), atol=2e-6)


def test_a_text_tower_without_its_tokenizer_is_refused(models, tmp_path):
    files = [path.name for path in (models / "clip").iterdir()]
    tokenizers = [name for name in files if name in ("tokenizer.json", "vocab.json", "merges.txt")]
    folder = without(models / "clip", tmp_path / "folder", *tokenizers)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_caption_embedder(str(folder))
    with pytest.raises(UserError, match="no text tower is known of a model of type 'dinov2'"):
        load_caption_embedder(str(models / "dinov2"))
    with pytest.raises(UsageError, match="unknown caption embedder 'bm25'.*ngrams"):
        load_caption_embedder("bm25")


def test_a_tokenizer_that_does_not_fit_is_refused(models, tmp_path):
    folder = without(models / "clip", tmp_path / "folder", "model.safetensors")
    config = transformers.CLIPConfig.from_pretrained(models / "clip")
    config.text_config.vocab_size = 40
    transformers.CLIPModel(config).save_pretrained(folder)
    with pytest.raises(UserError, match="does not embed a caption"):
        load_caption_embedder(str(folder))


def test_the_digest_of_a_text_tower_follows_its_tokenizer(models, tmp_path):
    folder = without(models / "clip", tmp_path / "folder")
    original = load_caption_embedder(str(models / "clip")).digest
    assert load_caption_embedder(str(folder)).digest == original
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("\n", "\n "))
    assert load_caption_embedder(str(folder)).digest != original


def test_a_sentence_encoder_gives_its_own_vectors(models, tmp_path, tiny_pipe):
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tiny_pipe.tokenizer), max_position_embeddings=32, **WIDTHS)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tiny_pipe.tokenizer.save_pretrained(tmp_path / "bert")
    model = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")  # adds a mean over tokens
    model.max_seq_length = 20
    model.save(str(tmp_path / "sentences"))
    embedder = load_caption_embedder(f"sentence-transformers:{tmp_path / 'sentences'}")
    rows = embedder.embed(CAPTIONS)
    np.testing.assert_allclose(rows[:5], model.encode(CAPTIONS[:5], normalize_embeddings=True), atol=1e-5)
    np.testing.assert_allclose(embedder.embed(CAPTIONS[1:2])[0], rows[1], atol=1e-6)
    assert load_caption_embedder(str(tmp_path / "sentences")).digest == embedder.digest
    weights = next((tmp_path / "sentences").rglob("model.safetensors"))
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        load_caption_embedder(str(tmp_path / "sentences"))


# ------------------------------------------------------------------------------------------------- in the job


def test_curation_and_search_run_on_towers_and_notice_other_weights(models, emoji, tmp_path):
    def webp(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "webp", lossless=True)
        return buffer.getvalue()

    samples = [(f"{i:03d}", {"webp": webp(image), "txt": caption.encode()}) for i, (image, caption) in enumerate(emoji)]
    write_shard(tmp_path / "in.tar", samples)
    model = without(models / "clip", tmp_path / "clip")
    config = DedupConfig(
        [str(tmp_path / "in.tar")],
        str(tmp_path / "out"),
        image_embedder=str(model),
        caption_embedder=str(model),
        threshold=0.9999,
        caption_threshold=0.9999,
        workers=1,
    )
    assert run_dedup(config)["samples"] == 64
    caches = {path.name for path in (tmp_path / "out" / "work").rglob("*.parquet")}
    index = json.loads((tmp_path / "out" / "index" / "index.json").read_text())
    assert index["embedder"] == str(model) and index["dim"] == 24

    found = run_search(SearchConfig(str(tmp_path / "out"), caption=emoji[5][1], caption_embedder=str(model), k=1))
    assert found["nearest"][0]["caption"] == emoji[5][1] and found["nearest"][0]["similarity"] > 0.999
    (tmp_path / "5.webp").write_bytes(samples[5][1]["webp"])
    found = run_search(SearchConfig(str(tmp_path / "out"), image=str(tmp_path / "5.webp"), k=1))
    assert found["nearest"][0]["key"] == "005"

    def caches_after(**changes: object) -> set[str]:
        run_dedup(DedupConfig(**{**vars(config), **changes}))
        return {path.name for path in (tmp_path / "out" / "work").rglob("*.parquet")}

    assert caches_after() == caches
    (kept,) = caches_after(caption_embedder="ngrams") & {name for name in caches if not name.startswith("pairs")}
    assert len(caches_after() & caches) == len(caches)  # the name alone: nothing else changed
    weights = load_file(model / "model.safetensors")
    weights["visual_projection.weight"] *= torch.linspace(0.5, 1.5, 24)[:, None]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert kept not in caches_after()
