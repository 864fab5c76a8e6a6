"""Models of other libraries: their folders, their packages, and what is missing of them."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afresh.errors import UsageError, UserError, reason
from afresh.files import read_json

# What is asked of the hub: no pickles, and nothing of other frameworks.
TRANSFORMERS_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")
_EXTRAS = {"timm": "timm", "open_clip": "clip", "sentence_transformers": "sentence-transformers"}


def model_folder(source: str, files: Sequence[str]) -> Path:
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


def imported(package: str) -> Any:
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


def needed_file(folder: Path, name: str, what: str) -> Path:
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}, {what}")
    return folder / name


class _Output(nn.Module):
    """A tower of transformers, reduced to one of its outputs."""

    def __init__(self, tower: Any, output: str) -> None:
        super().__init__()
        self.tower: Any = tower
        self.output = output

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return getattr(self.tower(*inputs, **named), self.output)


def transformers_tower(
    folder: Path, towers: Mapping[str, tuple[str, str]], what: str
) -> tuple[_Output, dict[str, Any]]:
    """A tower with all of its weights, and its config as JSON has it.

    Raises:
        UserError: a file or a weight is missing, or the model is of another kind.
    """
    config = read_json(needed_file(folder, "config.json", "which says what model it is"))
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

    with quiet(transformers):
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
def quiet(transformers: Any) -> Iterator[None]:
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

