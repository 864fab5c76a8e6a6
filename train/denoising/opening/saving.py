"""Write a pipeline in the form that all releases of diffusers and transformers in use can read.

What the installed releases write, older ones do not always read: newer transformers drop the prefix of a text encoder's
weights, write no vocabulary beside ``tokenizer.json``, and name an image processor by what it runs on. So what they
wrote is brought to the names that the hub's models have, which old and new releases read alike.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from afresh.files import read_json, write_atomic, write_json

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


PREFIX = "text_model."
"""Of every weight of a CLIP text encoder but its projection."""


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path, *, half: bool = False) -> None:
    """Write a pipeline as a folder.

    Args:
        pipe: what is saved; with ``half`` its weights become half precision in place.
        folder: that does not exist yet.
        half: write float16 weights, under the names of the variant ``fp16``.
    """
    if half:
        pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, variant="fp16" if half else None)
    for config in folder.glob("text_encoder*/config.json"):
        if not read_json(config)["model_type"].startswith("clip"):  # T5's weights have no such prefix
            continue
        for path in config.parent.glob("*.safetensors"):
            _prefix_weights(path)
        for path in config.parent.glob("*.index*.json"):
            index = read_json(path)
            write_json(path, index | {"weight_map": prefixed(index["weight_map"])})
    for path in folder.glob("tokenizer*/tokenizer.json"):
        _write_vocabulary(path.parent)
    for path in (folder / "model_index.json", *folder.glob("feature_extractor/*.json")):
        text = path.read_text(encoding="utf-8")
        plain = re.sub(r'(ImageProcessor)(Pil|Fast)"', r'\1"', text)
        if plain != text:
            path.write_text(plain, encoding="utf-8")


def prefixed(state: dict[str, Any]) -> dict[str, Any]:
    """The weights of a CLIP text encoder under the names that they have in every release's reading."""
    return {name if name.startswith((PREFIX, "text_projection.")) else PREFIX + name: x for name, x in state.items()}


def text_encoder_weights(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The text encoder's weights by those names, without the positions' numbers that old releases kept among them."""
    state = prefixed(pipe.text_encoder.state_dict())
    return {name: value for name, value in state.items() if not name.endswith("position_ids")}


def _prefix_weights(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    if (names := prefixed(state)).keys() != state.keys():
        with write_atomic(path) as temporary:
            save_file(names, temporary, metadata={"format": "pt"})


def _write_vocabulary(folder: Path) -> None:
    """``vocab.json`` and ``merges.txt``, which a tokenizer that is no compiled one is read from."""
    model = read_json(folder / "tokenizer.json")["model"]
    if "merges" not in model or (folder / "vocab.json").is_file():
        return
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
