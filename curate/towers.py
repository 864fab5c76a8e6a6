"""Image and text towers of other libraries as embedders: transformers, timm, open_clip, sentence-transformers.

A tower is found by its folder or its hub name, which is fetched (or found in the hub's cache, offline) as a folder too.
Weights are read from safetensors only. What an image goes through before the network stands in the model's own files
and is done by :mod:`curate.preprocess`, so nothing here needs torchvision but timm and open_clip themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from curate.console import UsageError, UserError, progress
from curate.networks import TorchEmbedder, reason, weights_digest
from curate.preprocess import Preprocessing, read_json, read_processor, triple

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
_TEXT_TOWERS = {
    "clip": ("CLIPTextModelWithProjection", "text_embeds"),
    "clip_text_model": ("CLIPTextModelWithProjection", "text_embeds"),
    "siglip": ("SiglipTextModel", "pooler_output"),
    "siglip_text_model": ("SiglipTextModel", "pooler_output"),
}
# What is asked of the hub: no pickles, and nothing of other frameworks.
_TRANSFORMERS_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")
_TIMM_FILES = ("config.json", "model.safetensors")
_OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
_OPEN_CLIP_WEIGHTS = _OPEN_CLIP_FILES[1]
_SENTENCE_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
_FILTERS = ("bilinear", "bicubic", "lanczos")
_EXTRAS = {"timm": "timm", "open_clip": "clip", "sentence_transformers": "sentence-transformers"}


# --------------------------------------------------------------------------------------------- finding a model


def load_image_tower(library: str, source: str, *, name: str, half: bool | None) -> TorchEmbedder:
    """The image tower of a model as an embedder.

    Args:
        library: one of :data:`curate.embed.IMAGE_LIBRARIES`.
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


def _folder(source: str, files: Sequence[str]) -> Path:
    """A local folder as it is, or the named files of a hub repository as a folder of the hub's cache.

    Raises:
        UsageError: there is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or path.exists():
        raise UsageError(f"{source}: no such model folder")
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if multiprocessing.parent_process() is not None:  # the parent has shown it
        disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:
        # Other libraries fetch single files: what there is may be all that is needed.
        if partial := getattr(error, "snapshot_path", None):
            return Path(partial)
        raise UsageError(
            f"{source}: no folder here, not in the hub's cache, and not to be had from the hub: {reason(error)}"
        ) from error


def _imported(package: str) -> Any:
    """A package that is no dependency.

    Raises:
        UsageError: it is not installed, or lacks something itself; names the extra.
    """
    extra = _EXTRAS[package]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == package:
            why = f"{package} is not installed"
        else:
            why = f"{package} cannot be imported ({reason(error)})"
        raise UsageError(f"{why}: pip install 'afresh[{extra}]'") from error
    except Exception as error:  # a torchvision of another torch's build ends in a RuntimeError
        raise UsageError(
            f"{package} cannot be imported ({reason(error)}): "
            f"are torch and torchvision of the same build? pip install 'afresh[{extra}]'"
        ) from error


def _need(folder: Path, name: str, what: str) -> Path:
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}, {what}")
    return folder / name


# ---------------------------------------------------------------------------------------------- transformers


class _Output(nn.Module):
    """A tower of transformers, reduced to one of its outputs."""

    def __init__(self, tower: Any, output: str) -> None:
        super().__init__()
        self.tower: Any = tower
        self.output = output

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return getattr(self.tower(*inputs, **named), self.output)


def _transformers_image(source: str) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    folder = _folder(source, _TRANSFORMERS_FILES)
    model, config = _transformers_tower(folder, _IMAGE_TOWERS, "image")
    return model, read_processor(folder), {"config": config}


def _transformers_tower(
    folder: Path, towers: Mapping[str, tuple[str, str]], what: str
) -> tuple[_Output, dict[str, Any]]:
    """A tower with all of its weights, and its config as JSON has it.

    Raises:
        UserError: a file or a weight is missing, or the model is of another kind.
    """
    config = read_json(_need(folder, "config.json", "which says what model it is"))
    kind = str(config.get("model_type"))
    if kind not in towers:
        raise UserError(f"{folder}: no {what} tower is known of a model of type {kind!r} (but of {', '.join(towers)})")
    class_name, output = towers[kind]
    bare = class_name.removesuffix("WithProjection")
    if bare in config.get("architectures", ()):  # it was saved without its projection
        class_name, output = bare, "pooler_output"
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"{folder} has no weights as safetensors (model.safetensors); other formats are not loaded")
    import transformers

    with _quiet(transformers):
        try:
            model, info = getattr(transformers, class_name).from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, local_files_only=True
            )
        except Exception as error:
            raise UserError(f"{folder} cannot be loaded: {reason(error)}") from error
    lacking = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise UserError(f"{folder} lacks weights of its {what} tower, such as {lacking[0]}")
    return _Output(model, output), config


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its bars, which would cross ours, and its report of the other tower's weights, which are not loaded."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------ timm, open_clip


def _timm_image(source: str) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    timm = _imported("timm")
    folder = _folder(_timm_repository(timm, source), _TIMM_FILES)
    config = read_json(_need(folder, "config.json", "which says what model it is"))
    weights = _need(folder, "model.safetensors", "its weights; other formats are not loaded")
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
    open_clip = _imported("open_clip")
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
            return arch, _need(path, _OPEN_CLIP_WEIGHTS, "its weights; other formats are not loaded"), arch
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
    folder = _folder(source, _OPEN_CLIP_FILES)
    _need(folder, _OPEN_CLIP_FILES[0], "which says what model it is: name its architecture, as in ARCH/FOLDER")
    weights = _need(folder, _OPEN_CLIP_WEIGHTS, "its weights; other formats are not loaded")
    return f"local-dir:{folder}", weights, str(folder)


# --------------------------------------------------------------------------------------------------- captions

_BATCH = 256  # captions embedded at a time
_TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "vocab.txt")


class TextEmbedder:
    """A text tower as a :class:`~curate.embed.CaptionEmbedder`.

    Args:
        name: which one.
        model: its module; frozen here.
        vectors: texts → ``[n, dim]`` on the model's device.
        settings: whatever else decides the vectors, JSON; for ``digest``.
        half: see :func:`curate.embed.load_embedder`.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        vectors: Callable[[list[str]], Tensor],
        settings: object,
        half: bool | None,
    ) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self._device)
        self._vectors, self._settings = vectors, settings
        self._half = self._device.type == "cuda" if half is None else half
        self.dim = self.embed(["a"]).shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the weights and the settings, the tokenizer among them."""
        return weights_digest(self.model, self._settings)

    def embed(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Captions → float32 ``[n, dim]``, unit rows; what is longer than the tower's context is cut."""
        # A lone surrogate, which no tokenizer takes, becomes a question mark.
        texts = [caption.encode("utf-8", "replace").decode("utf-8") for caption in captions]
        blocks = []
        with progress(total=len(texts), desc="embedding captions", unit="captions") as bar, torch.inference_mode():
            for start in range(0, len(texts), _BATCH):
                with torch.autocast(self._device.type, dtype=torch.float16, enabled=self._half):
                    vectors = self._vectors(texts[start : start + _BATCH])
                blocks.append(torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy())
                bar.update(len(blocks[-1]))
        return np.concatenate(blocks) if blocks else np.empty((0, self.dim), np.float32)


def load_text_tower(library: str, source: str, *, name: str, half: bool | None) -> TextEmbedder:
    """The text tower of a model as a caption embedder.

    Args:
        library: one of :data:`curate.embed.CAPTION_LIBRARIES`.
        source: hub name or folder.
        name: what it is called.
        half: see :func:`curate.embed.load_embedder`.

    Raises:
        UsageError: the library is not installed, or the name or folder cannot be found.
        UserError: the folder lacks a part, or the model is of another kind.
    """
    load = {"transformers": _transformers_text, "sentence-transformers": _sentence_transformers}[library]
    model, vectors, settings = load(source)
    try:
        return TextEmbedder(name, model, vectors, {"library": library, **settings}, half)
    except Exception as error:
        raise UserError(f"{source} does not embed a caption: {reason(error)}") from error


def _transformers_text(source: str) -> tuple[nn.Module, Callable[[list[str]], Tensor], dict[str, Any]]:
    import transformers

    folder = _folder(source, _TRANSFORMERS_FILES)
    model, config = _transformers_tower(folder, _TEXT_TOWERS, "text")
    tokenizers = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    if not tokenizers:
        raise UserError(f"{folder} has no {_TOKENIZERS[0]}: its captions cannot be turned into tokens")
    with _quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise UserError(f"the tokenizer of {folder} cannot be loaded: {reason(error)}") from error
    length = model.tower.config.max_position_embeddings

    def vectors(texts: list[str]) -> Tensor:
        # Always to the full length, as SigLIP was trained; CLIP's vector stands before the padding.
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        ids = tokenizer(texts, return_tensors="pt", **options).input_ids
        return model(ids.to(next(model.parameters()).device))

    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tokenizers}
    return model, vectors, {"config": config, "tokenizer": files}


def _sentence_transformers(source: str) -> tuple[nn.Module, Callable[[list[str]], Tensor], dict[str, Any]]:
    library = _imported("sentence_transformers")
    if "/" not in source and not Path(source).expanduser().is_dir():
        source = f"sentence-transformers/{source}"
    folder = _folder(source, _SENTENCE_FILES)
    _need(folder, "modules.json", "which says what a sentence goes through")
    for path in folder.rglob("pytorch_model.bin"):
        if not (path.parent / "model.safetensors").is_file():
            raise UserError(f"{path} is a pickle; only weights as safetensors are loaded")
    import transformers

    with _quiet(transformers):
        try:
            model = library.SentenceTransformer(
                str(folder), device="cpu", local_files_only=True, model_kwargs={"use_safetensors": True}
            )
        except Exception as error:
            raise UserError(f"{folder} cannot be loaded: {reason(error)}") from error

    def vectors(texts: list[str]) -> Tensor:
        return model.encode(texts, batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False)

    # Modules, pooling and tokenizer stand in small files.
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".txt", ".model")]
    digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return model, vectors, {"files": digests}
