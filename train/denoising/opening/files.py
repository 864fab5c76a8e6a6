"""The files of a model and of adapters, seen before anything heavy is loaded: what is missing, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afresh.errors import UsageError, UserError, reason
from afresh.files import files_in, read_json
from train.denoising.kinds import Family, family_of, supported
from train.denoising.opening.outputs import ADAPTERS, model_file, trained_file


def check_openable(config: Any) -> None:
    """See what can be seen of the model, the adapters and the device that a job's settings name.

    A name that is no path is taken for one of the hub, which is not asked.

    Args:
        config: with ``model`` and ``device``, ``variant`` and ``lora``, as ``loading.open_pipeline`` takes it.

    Raises:
        UserError: names what is missing, cut short or of another kind.
    """
    check_model(config.model, config.variant)
    if config.lora:
        adapter_options(config.lora)
    if config.device not in ("auto", "cpu"):
        check_device(config.device)


def check_model(name: str, variant: str | None = None) -> None:
    """See that a model is whole by its files' names and headers, where it is a local one.

    Raises:
        UserError: names what is missing, cut short or of another kind.
    """
    path = Path(model_file(name))
    if path.is_dir():
        check_folder(path, variant)
    elif is_single_file(path):
        names = check_header(path)
        if any(".lora_" in one or one.startswith("lora_") for one in names):
            raise UserError(f"{path}: adapters and no model: give it as --lora, and as --model what it was trained on")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:  # the hub's are `name` or `owner/name`
        raise UserError(f"{name}: there is no such model folder")


def check_device(name: str) -> None:
    """See that torch can put a tensor on a device.

    Raises:
        UsageError: it cannot.
    """
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name}: cannot be used here ({reason(error)}): take auto or cpu") from error


def is_single_file(path: Path) -> bool:
    """Whether a path means a checkpoint in one file, there or not."""
    return path.is_file() or path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def check_folder(path: Path, variant: str | None) -> None:
    """See that a diffusers directory has every part, and weights of the variant as safetensors.

    Raises:
        UserError: names what is missing, and what is there in its place.
    """
    if not (path / "model_index.json").is_file():
        raise UserError(
            f"{path}: not a pipeline folder (it has no model_index.json), and no one .safetensors in it is a trainer's "
            "result: name the file"
        )
    index = read_json(path / "model_index.json")
    family = check_kind(str(path), index)
    missing = [part for part in family.parts if not _is_there(path / part) and not _left_out(part, family, index)]
    if missing:
        raise UserError(f"{path}: the model folder lacks {', '.join(missing)}: restore or re-export it")
    for part in family.weighted:
        if not _is_there(path / part):
            continue
        files = [file.name for file in files_in(path / part, "*.safetensors")]
        variants = {name.split(".")[1].split("-")[0] for name in files if name.count(".") > 1}
        there = ", ".join(sorted(variants)) or "none"
        plain = any(name.count(".") == 1 for name in files)
        if not files:
            pickles = files_in(path / part, "*.bin")
            found = f" but {pickles[0].name}: pickles are never loaded" if pickles else ""
            raise UserError(f"{path}: {part} has no safetensors weights{found}; re-export it as safetensors")
        if variant is None and not plain:
            raise UserError(f"{path}: {part} has weights of variant {there} alone: give --variant")
        if variant is not None and variant not in variants:
            raise UserError(f"{path}: {part} has no weights of variant {variant} (variants there: {there})")


def _is_there(part: Path) -> bool:
    return part.is_dir() and any(part.iterdir())


def _left_out(part: str, family: Family, index: Mapping[str, Any]) -> bool:
    """Whether a model does without a part, and may."""
    return part in family.optional and index.get(part) in (None, [None, None])


def check_kind(name: str, index: Mapping[str, Any]) -> Family:
    """The family that a ``model_index.json`` is of.

    Raises:
        UserError: it is of a kind of pipeline that is not known here, or half of one that is.
    """
    kind = index.get("_class_name", "none")
    family = family_of([kind])
    if family is None:
        raise UserError(f"{name}: a model of the kind {kind}; {supported()}")
    null = [part for part in family.parts if index.get(part, "") == [None, None] and part not in family.optional]
    if index.get("requires_aesthetics_score") or (len(family.encoders) > 1 and null == ["text_encoder", "tokenizer"]):
        raise UserError(f"{name}: a refiner of {family.name}, which finishes what the base has drawn: give the base")
    if null:
        raise UserError(f"{name}: this {family.name} comes without {', '.join(null)}: give one that is whole")
    return family


def check_header(path: Path) -> dict[str, list[int]]:
    """See that a single file is whole safetensors; the shapes in its header by name.

    Raises:
        UserError: it is missing, a pickle, or cut short.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such model file")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: pickles are never loaded, since they can run code; convert it to safetensors")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from error


def adapter_options(source: str | Path) -> dict[str, Any]:
    """How diffusers is told where adapters lie: a file, a folder that holds one, or a hub name.

    Raises:
        UserError: there is no such file, or it is no safetensors.
    """
    path = Path(source)
    options: dict[str, Any] = {"use_safetensors": True}
    if path.is_dir() and not (path / "adapter_config.json").is_file():  # which is peft's form
        if (file := trained_file(path)) is None:
            found = len(files_in(path, "*.safetensors"))
            raise UserError(f"{source}: expected {ADAPTERS}, or one .safetensors file; found {found}: name the file")
        options["weight_name"] = file.relative_to(path).as_posix()
    elif path.is_file() and path.suffix != ".safetensors":
        raise UserError(f"{source}: adapters are read from safetensors only")
    elif path.suffix == ".safetensors" and not path.is_file():
        raise UserError(f"{source}: no such LoRA file")
    return options
