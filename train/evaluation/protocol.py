"""Protocol files and presets: which models, guidances and prompts are compared, read and checked."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from afresh.errors import UsageError, reason
from train.evaluation.config import EvaluateConfig, Protocol, Setting

PRESETS = Path(__file__).parent / "presets"
WORDS = {dict: "keys and values", list: "a list", str: "text", int: "a whole number", float: "a number"}


def protocol_of(config: EvaluateConfig) -> Protocol:
    """The protocol of a job: its file's, or a preset's.

    Raises:
        UsageError: neither or both are given, or as :func:`read_protocol`.
    """
    if bool(config.protocol) == bool(config.preset):
        raise UsageError(f"what is compared says either --protocol FILE or --preset NAME ({', '.join(presets())})")
    if config.protocol:
        protocol = read_protocol(config.protocol)
    else:
        protocol = read_preset(config.preset, Path(config.data))
    if config.model:
        if len(protocol.models) > 1:
            raise UsageError(f"--model {config.model}: there are several models ({', '.join(protocol.models)})")
        protocol.models = dict.fromkeys(protocol.models, config.model)
    if config.dual_encoder:
        protocol.weights = {**protocol.weights, "dual-encoder": config.dual_encoder}
    return protocol


def read_protocol(path: str | Path) -> Protocol:
    """A protocol file, with its paths made relative to the working folder.

    Raises:
        UsageError: the file is missing or malformed; names the key.
    """
    path = Path(path)
    data = _yaml(path)
    preset = data.get("preset", "") if isinstance(data, dict) else ""
    if preset:
        own = _placed(_filled(Protocol, data, f"{path}", whole=False), path.parent)
        base = read_preset(preset, Path(own.data or path.parent), f"{path}: preset")
        protocol = dataclasses.replace(base, **{name: getattr(own, name) for name in data})
    else:
        protocol = _placed(_filled(Protocol, data, f"{path}"), path.parent)
    _check(protocol, f"{path}")
    return protocol


def presets() -> list[str]:
    """The names of all presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_preset(name: str, data: Path, option: str = "--preset") -> Protocol:
    """A preset, with its paths below the folder ``data``.

    Weights that are not there are left out, and beside a published list held-out images too: the metrics that need them
    are named as missing then, and the others measure.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in presets():
        raise UsageError(f"{option} {name!r} is not known; choose of {', '.join(presets())}")
    path = PRESETS / f"{name}.yaml"
    protocol = _placed(_filled(Protocol, _yaml(path), f"{path}"), data)
    weights = {of: at for of, at in protocol.weights.items() if _exists(at)}
    held_out = [shard for shard in protocol.held_out if not protocol.originals or Path(shard).exists()]
    return dataclasses.replace(protocol, preset=name, data=str(data), weights=weights, held_out=held_out)


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such protocol file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not readable as YAML: {reason(error)}") from None


def _check(protocol: Protocol, where: str) -> None:
    """Raise UsageError for what does not go together."""
    for key in ("models", "settings", "prompts"):
        if not getattr(protocol, key):
            raise UsageError(f"{where}: {key} is empty")
    known = ", ".join(protocol.models)
    for i, setting in enumerate(protocol.settings):
        if setting.model not in protocol.models:
            raise UsageError(f"{where}: settings[{i}]: no model {setting.model!r}; models names {known}")
    for key in ("loras", "neurons"):
        for name in getattr(protocol, key):
            if name not in protocol.models:
                raise UsageError(f"{where}: {key}: no model {name!r}; models names {known}")
    for kind in protocol.labels:
        if kind not in protocol.prompts:
            raise UsageError(f"{where}: labels: no prompts {kind!r}; prompts names {', '.join(protocol.prompts)}")
    if protocol.resamples < 0:
        raise UsageError(f"{where}: resamples is {protocol.resamples}: it is at least 0")


def _placed(protocol: Protocol, folder: Path) -> Protocol:
    """The same with its paths relative to the working folder."""

    def near(name: str) -> str:
        return str(folder / Path(name).expanduser()) if name and "://" not in name else name

    def there(named: dict[str, str]) -> dict[str, str]:
        # A model, adapters or weights may also be a hub name: only what lies beside the file is taken for a path.
        return {name: near(at) if _exists(near(at)) else at for name, at in named.items()}

    return dataclasses.replace(
        protocol,
        models=there(protocol.models),
        loras=there(protocol.loras),
        neurons={name: near(file) for name, file in protocol.neurons.items()},
        weights=there(protocol.weights),
        prompts={kind: near(file) for kind, file in protocol.prompts.items()},
        index=near(protocol.index),
        originals=near(protocol.originals),
        training=[near(shard) for shard in protocol.training],
        held_out=[near(shard) for shard in protocol.held_out],
        data=near(protocol.data),
    )


def _exists(path: str) -> bool:
    """Whether a file or folder is there; of an embedder's file without the ``@SIZE`` that may follow its name."""
    return Path(path).exists() or Path(path.rpartition("@")[0] or path).is_file()


def _filled(kind: type, data: Any, where: str, *, whole: bool = True) -> Any:
    """A dataclass from a mapping: unknown, missing and ill-typed keys are refused by name.

    With ``whole=False`` keys may be missing; empty ones stand in their place.
    """
    if not isinstance(data, dict):
        raise UsageError(f"{where}: expected keys and values")
    data, hints = dict(data), typing.get_type_hints(kind)
    unknown = [key for key in data if key not in hints]
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(hints)}")
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        expected = typing.get_origin(hint) or hint
        if field.name not in data:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                if whole:
                    raise UsageError(f"{where}: the key {field.name!r} is missing")
                data[field.name] = expected()
            continue
        value = data[field.name]
        if expected is float and type(value) is int:
            value = data[field.name] = float(value)
        if not isinstance(value, expected) or isinstance(value, bool):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected {WORDS[expected]}")
        inner = {dict: lambda v: list(v.values()), list: list}.get(expected, lambda v: [])(value)
        of = typing.get_args(hint)[-1:]
        if of == (Setting,):
            data[field.name] = [_filled(Setting, item, f"{where}: {field.name}[{i}]") for i, item in enumerate(inner)]
        for one in (str, int):
            if of == (one,) and not all(isinstance(item, one) and not isinstance(item, bool) for item in inner):
                raise UsageError(f"{where}: {field.name} is {value!r}, expected {WORDS[one]} in every place")
    return kind(**data)
