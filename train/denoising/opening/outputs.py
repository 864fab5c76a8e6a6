"""The output folders of other trainers: which of the files in them is the model, or the adapters, that a run made.

Trainers of single files (kohya's sd-scripts, ai-toolkit, OneTrainer) leave the result under the run's name and what was
saved on the way beside it, with its epoch or step: ``dog-000004``, ``dog-step00000500``, ``dog_000000250``. diffusers'
scripts and SimpleTuner leave folders ``checkpoint-500``.
"""

from __future__ import annotations

import re
from pathlib import Path

from afresh.files import files_in

ADAPTERS = "pytorch_lora_weights.safetensors"
"""The name under which diffusers saves adapters."""
_ON_THE_WAY = re.compile(r".*[-_](?:step)?(\d{6,})")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def trained_file(folder: Path) -> Path | None:
    """The result of a run, or while there is none what it saved last; None where that cannot be told.

    Args:
        folder: the output folder of a run; safetensors alone are looked for.
    """
    files = files_in(folder, "*.safetensors")
    if folder / ADAPTERS in files:
        return folder / ADAPTERS
    saved = {file: match for file in files if (match := _ON_THE_WAY.fullmatch(file.stem)) is not None}
    results = [file for file in files if file not in saved]
    if results:
        return results[0] if len(results) == 1 else None
    if saved:
        return max(saved, key=lambda file: (int(saved[file][1]), file.name))
    steps = {
        folder / ADAPTERS: int(match[1])
        for folder in folder.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(folder.name)) is not None and (folder / ADAPTERS).is_file()
    }
    return max(steps, key=steps.__getitem__) if steps else None


def model_file(name: str) -> str:
    """A model's name or path, and of the output folder of a trainer of single files the file that it made."""
    path = Path(name)
    if path.is_dir() and not (path / "model_index.json").is_file() and (file := trained_file(path)) is not None:
        return str(file)
    return name
