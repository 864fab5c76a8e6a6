"""Model folders, names and packages: what is missing or not to be trusted is refused in one clear line."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from afresh.errors import UsageError, UserError
from curate.embed.registry import load_embedder
from tests.curate.embed.made_models import BLOCKER, python, without


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
