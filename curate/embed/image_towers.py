"""Image and text towers of other libraries as embedders: transformers, timm, open_clip, sentence-transformers.

A tower is found by its folder or its hub name, which is fetched (or found in the hub's cache, offline) as a folder too.
Weights are read from safetensors only. What an image goes through before the network stands in the model's own files
and is done by :mod:`curate.embed.preprocessing`, so nothing here needs torchvision but timm and open_clip themselves.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from afresh.errors import UsageError, UserError, reason
from afresh.files import read_json
from curate.embed.preprocessing import Preprocessing, read_processor, triple
from curate.embed.torch_embedder import TorchEmbedder
from curate.embed.tower_files import TRANSFORMERS_FILES, imported, model_folder, needed_file, transformers_tower

# model_type of a config → class of the tower, and which of its outputs is the image's vector. CLIP's and SigLIP's are
# where captions are too; DINOv2's is the class token, as its authors use it.
_IMAGE_TOWERS = {
    "clip": ("CLIPVisionModelWithProjection", "image_embeds"),
    "clip_vision_model": ("CLIPVisionModelWithProjection", "image_embeds"),
    "siglip": ("SiglipVisionModel", "pooler_output"),
    "siglip_vision_model": ("SiglipVisionModel", "pooler_output"),
    "dinov2": ("Dinov2Model", "pooler_output"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "pooler_output"),
    "dinov3_vit": ("DINOv3ViTModel", "pooler_output"),
}
_TIMM_FILES = ("config.json", "model.safetensors")
_OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
_OPEN_CLIP_WEIGHTS = _OPEN_CLIP_FILES[1]
_FILTERS = ("bilinear", "bicubic", "lanczos")


def load_image_tower(library: str, source: str, *, name: str, half: bool | None) -> TorchEmbedder:
    """The image tower of a model as an embedder.

    Args:
        library: one of :data:`curate.embed.registry.IMAGE_LIBRARIES`.
        source: hub name or folder; for open_clip also ``ARCH/PRETRAINED``, a tag, a folder or a safetensors file.
        name: what the index records.
        half: see :func:`curate.embed.load_embedder`.

    Raises:
        UsageError: the library is not installed, or the name or folder cannot be found.
        UserError: the folder lacks a part, or the model is of another kind.
    """
    load = {"transformers": _transformers_image, "timm": _timm_image, "open_clip": _open_clip_image}[library]
    model, preprocessing, settings = load(source)
    side = preprocessing.side
    try:
        with torch.inference_mode():
            answer = model.eval()(torch.zeros(1, 3, side, side))
    except Exception as error:
        raise UserError(f"{source} does not take images of {side} pixels: {reason(error)}") from error
    if not isinstance(answer, Tensor) or answer.ndim != 2:
        raise UserError(f"{source} does not answer an image with one vector")
    settings = {"library": library, **settings}
    return TorchEmbedder(name, model, dim=answer.shape[1], preprocessing=preprocessing, settings=settings, half=half)


def _transformers_image(source: str) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    folder = model_folder(source, TRANSFORMERS_FILES)
    model, config = transformers_tower(folder, _IMAGE_TOWERS, "image")
    return model, read_processor(folder), {"config": config}


def _timm_image(source: str) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    timm = imported("timm")
    folder = model_folder(_timm_repository(timm, source), _TIMM_FILES)
    config = read_json(needed_file(folder, "config.json", "which says what model it is"))
    weights = needed_file(folder, "model.safetensors", "its weights; other formats are not loaded")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
        with safe_open(weights, "pt") as file:
            lacking = sorted(set(model.state_dict()) - set(file.keys()))
    except Exception as error:
        raise UserError(f"{folder} cannot be loaded: {reason(error)}") from error
    if lacking:  # timm leaves them as they were initialised
        raise UserError(f"{folder} lacks weights of its image tower, such as {lacking[0]}")
    data = timm.data.resolve_model_data_config(model)
    height, width = data["input_size"][-2:]
    if height != width or data["crop_mode"] not in ("center", "squash") or data["interpolation"] not in _FILTERS:
        raise UserError(
            f"{folder}: images of {height} × {width}, {data['crop_mode']}, {data['interpolation']}: not supported"
        )
    preprocessing = Preprocessing(
        size=math.floor(height / data["crop_pct"]),
        fit="squash" if data["crop_mode"] == "squash" else "shortest",
        crop=height,
        filter=data["interpolation"],
        mean=triple(data["mean"], folder),
        std=triple(data["std"], folder),
        rounds=True,
    )
    return model, preprocessing, {"config": config}


def _timm_repository(timm: Any, source: str) -> str:
    """A folder or repository as it is; of a name from timm's own list, its repository."""
    if "/" in source or Path(source).expanduser().is_dir():
        return source
    try:
        config = timm.models.get_pretrained_cfg(source)
    except Exception as error:
        raise UsageError(f"timm:{source}: {reason(error)}") from error
    if config is None or not config.hf_hub_id:
        raise UsageError(f"timm:{source}: no folder here, and timm knows no weights of this name")
    return str(config.hf_hub_id)


class _Visual(nn.Module):
    """The image tower of an open_clip model: its pooled vector, where it gives tokens too."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        answer = self.tower(pixels)
        return answer[0] if isinstance(answer, tuple) else answer


def _open_clip_image(source: str) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    open_clip = imported("open_clip")
    name, weights, about = _open_clip_source(open_clip, source)
    try:
        options = {"pretrained": str(weights)} if name == about else {}
        model = open_clip.create_model(name, precision="fp32", device="cpu", require_pretrained=True, **options)
    except Exception as error:
        raise UserError(f"{weights} cannot be loaded as {about}: {reason(error)}") from error
    data = {"interpolation": "bicubic", "resize_mode": "shortest", **open_clip.get_model_preprocess_cfg(model)}
    size = data["size"] if isinstance(data["size"], int) else max(data["size"])
    square = data["size"] in (size, (size, size), [size, size])
    if not square or data["resize_mode"] not in ("shortest", "squash") or data["interpolation"] not in _FILTERS:
        raise UserError(
            f"{about}: images of {data['size']}, {data['resize_mode']}, {data['interpolation']}: not supported"
        )
    preprocessing = Preprocessing(
        size=size,
        fit=data["resize_mode"],
        crop=size,
        filter=data["interpolation"],
        mean=triple(data["mean"], about),
        std=triple(data["std"], about),
        rounds=True,
    )
    # The activation is no weight, and the same weights may go with another one.
    return _Visual(model.visual), preprocessing, {"config": str(model.visual)}


def _open_clip_source(open_clip: Any, source: str) -> tuple[str, Path, str]:
    """What ``create_model`` is told, where the weights are, and what messages call the model.

    A folder or repository with a config of its own needs no ARCH; otherwise ``ARCH/`` comes first, and then a tag from
    open_clip's list, a folder or a safetensors file.

    Raises:
        UsageError: nothing is found under the name.
        UserError: the folder lacks its config or its weights.
    """
    arch, _, rest = source.partition("/")
    if rest and arch in open_clip.list_models() and not Path(source).expanduser().is_dir():
        path = Path(rest).expanduser()
        if path.suffix == ".safetensors" and path.is_file():
            return arch, path, arch
        if path.is_dir() and not (path / _OPEN_CLIP_FILES[0]).is_file():
            return arch, needed_file(path, _OPEN_CLIP_WEIGHTS, "its weights; other formats are not loaded"), arch
        if not path.is_dir():
            known = open_clip.get_pretrained_cfg(arch, rest)
            if not known:
                tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
                raise UsageError(f"{rest}: no folder, no safetensors file, and no tag of {arch} (which has: {tags})")
            if not known.get("hf_hub"):
                raise UsageError(f"open_clip:{source}: these weights are not to be had as safetensors")
            rest = known["hf_hub"].rstrip("/")
        source = rest
    elif not rest and not Path(source).expanduser().is_dir():
        raise UsageError(f"open_clip:{source}: name the architecture and its weights, ARCH/PRETRAINED, or a folder")
    folder = model_folder(source, _OPEN_CLIP_FILES)
    needed_file(folder, _OPEN_CLIP_FILES[0], "which says what model it is: name its architecture, as in ARCH/FOLDER")
    weights = needed_file(folder, _OPEN_CLIP_WEIGHTS, "its weights; other formats are not loaded")
    return f"local-dir:{folder}", weights, str(folder)

