"""Protocol files: which models, guidances and prompts are compared, read and checked."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from afresh.errors import UsageError, reason
from train.evaluation.config import Protocol, Setting


def read_protocol(path: str | Path) -> Protocol:
    """A protocol file, with its paths made relative to the working folder.

    Raises:
        UsageError: the file is missing or malformed; names the key.
    """
    import yaml

    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such protocol file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not readable as YAML: {reason(error)}") from None
    protocol = _filled(Protocol, data, f"{path}")
    protocol.settings = [_filled(Setting, item, f"{path}: settings[{i}]") for i, item in enumerate(protocol.settings)]
    for i, setting in enumerate(protocol.settings):
        if setting.model not in protocol.models:
            known = ", ".join(protocol.models)
            raise UsageError(f"{path}: settings[{i}]: no model {setting.model!r}; models names {known}")
    for name in protocol.loras:
        if name not in protocol.models:
            raise UsageError(f"{path}: loras: no model {name!r}; models names {', '.join(protocol.models)}")
    for key in ("models", "settings", "prompts", "training", "held_out"):
        if not getattr(protocol, key):
            raise UsageError(f"{path}: {key} is empty")

    def near(name: str) -> str:
        return str(path.parent / name) if "://" not in name else name

    # A model or its adapters may also be a hub name: only what lies beside the file is taken for a path.
    for named in (protocol.models, protocol.loras):
        named.update({name: near(at) for name, at in named.items() if Path(near(at)).exists()})
    protocol.prompts = {kind: near(file) for kind, file in protocol.prompts.items()}
    protocol.index = near(protocol.index)
    protocol.training = [near(shard) for shard in protocol.training]
    protocol.held_out = [near(shard) for shard in protocol.held_out]
    return protocol


def _filled(kind: type, data: Any, where: str) -> Any:
    """A dataclass from a mapping: unknown, missing and ill-typed keys are refused by name."""
    if not isinstance(data, dict):
        raise UsageError(f"{where}: expected keys and values")
    hints = typing.get_type_hints(kind)
    unknown = [key for key in data if key not in hints]
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(hints)}")
    for field in dataclasses.fields(kind):
        if field.name not in data:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise UsageError(f"{where}: the key {field.name!r} is missing")
            continue
        hint, value = hints[field.name], data[field.name]
        expected = typing.get_origin(hint) or hint
        if expected is float and type(value) is int:
            value = data[field.name] = float(value)
        inner = {dict: lambda v: list(v.values()), list: list}.get(expected, lambda v: [])
        if not isinstance(value, expected) or isinstance(value, bool):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected {_words(expected)}")
        if str in typing.get_args(hint)[-1:] and not all(isinstance(item, str) for item in inner(value)):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected text in every place")
    return kind(**data)


def _words(kind: type) -> str:
    return {dict: "keys and values", list: "a list", str: "text", int: "a whole number", float: "a number"}[kind]

