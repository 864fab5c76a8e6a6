"""Text towers of transformers and sentence-transformers as embedders of captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from afresh.errors import UserError, reason
from afresh.progress import progress
from curate.embed.torch_embedder import weights_digest
from curate.embed.tower_files import TRANSFORMERS_FILES, imported, model_folder, needed_file, quiet, transformers_tower

_TEXT_TOWERS = {
    "clip": ("CLIPTextModelWithProjection", "text_embeds"),
    "clip_text_model": ("CLIPTextModelWithProjection", "text_embeds"),
    "siglip": ("SiglipTextModel", "pooler_output"),
    "siglip_text_model": ("SiglipTextModel", "pooler_output"),
}
_SENTENCE_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
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
        self._vectors, self._settings = vectors, settings
        self._half = self._device.type == "cuda" if half is None else half
        with torch.inference_mode():
            self.dim = vectors(["a"]).shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the weights and the settings, the tokenizer among them."""
        return weights_digest(self.model, self._settings)

    def embed(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Captions → float32 ``[n, dim]``, unit rows; what is longer than the tower's context is cut."""
        # A lone surrogate, which no tokenizer takes, becomes a question mark.
        texts = [caption.encode("utf-8", "replace").decode("utf-8") for caption in captions]
        with torch.inference_mode(False):
            self.model.to(self._device)  # not before: while images are read, GPUs are for these
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
        library: one of :data:`curate.embed.registry.CAPTION_LIBRARIES`.
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

    folder = model_folder(source, TRANSFORMERS_FILES)
    model, config = transformers_tower(folder, _TEXT_TOWERS, "text")
    tokenizers = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    if not tokenizers:
        raise UserError(f"{folder} has no {_TOKENIZERS[0]}: its captions cannot be turned into tokens")
    with quiet(transformers):
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
    library = imported("sentence_transformers")
    if "/" not in source and not Path(source).expanduser().is_dir():
        source = f"sentence-transformers/{source}"
    folder = model_folder(source, _SENTENCE_FILES)
    needed_file(folder, "modules.json", "which says what a sentence goes through")
    for path in folder.rglob("pytorch_model.bin"):
        if not (path.parent / "model.safetensors").is_file():
            raise UserError(f"{path} is a pickle; only weights as safetensors are loaded")
    import transformers

    with quiet(transformers):
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

