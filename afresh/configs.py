"""Command lines and YAML files → a verb's dataclass; what is wrong with them in one line."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import io
import json
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from afresh.errors import UsageError, one_line, reason

EPILOG = (
    "Lists are given as a,b,c or [a, b, c]. --json prints the summary as JSON alone on stdout; --debug adds "
    "the traceback to an error; --check_config stops when the configuration has been read and found good."
)


@dataclass(frozen=True)
class Verb:
    """One verb: where its dataclass and its job function are, and which fields may come without a ``--key``.

    Attributes:
        config: ``"module:Class"`` of a dataclass.
        job: ``"module:function"`` that takes the dataclass and returns a summary.
        check: ``"module:function"`` that takes the dataclass and raises what can be seen to be wrong before the job's
            own modules are loaded; empty where there is none.
        help: one line for the list of verbs.
        positionals: fields given by position, in order; at most one of them is a list.
    """

    config: str
    job: str
    help: str
    positionals: tuple[str, ...] = ()
    check: str = ""


@dataclass
class Options:
    """A verb's command line, sorted.

    Attributes:
        settings: (dotted key, value), in the order given.
        configs: paths of ``--config`` files.
        passed: what the parser itself answers: ``--help``, ``--print_config``.
        json: whether the summary is printed as JSON alone.
        check: whether to stop once the configuration is read.
    """

    settings: list[tuple[str, str]]
    configs: list[str]
    passed: list[str]
    json: bool = False
    check: bool = False


class _Setting(NamedTuple):
    where: str  # the file and a colon; empty for the command line
    key: str
    value: Any


def placeholder(field: str, many: bool) -> str:
    """How help and errors write a positional field."""
    return field.upper() + ("…" if many else "")


def read_config(package: str, name: str, verb: Verb, options: Options) -> Any:
    """The verb's dataclass, filled from defaults, config files and settings, in that order.

    Raises:
        UsageError: a missing or malformed file, an unknown or ill-typed key, a config of another job.
    """
    job = f"{package} {name}"
    config_class = load(verb.config)
    given = [setting for path in options.configs for setting in _settings_in(path, job, config_class)]
    given += [_Setting("", key, value) for key, value in options.settings]
    parser = _parser(package, name, verb, config_class)
    argv = [f"--config={path}" for path in options.configs]
    argv += [f"--{key}={_as_list(value, field_type(config_class, key))}" for key, value in options.settings]
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            namespace = parser.parse_args(argv + options.passed)
    except ArgumentError as error:
        raise UsageError(_fault(config_class, given, job) or reason(error)) from None
    except SystemExit:  # --help and --print_config
        if any(flag.startswith("--print_config") for flag in options.passed):
            print(f"job: {job}")  # so that what is printed is a config file of its own
        print(printed.getvalue(), end="")
        raise
    try:
        values = parser.instantiate(namespace)
        config = config_class(**{field.name: values[field.name] for field in _init_fields(config_class)})
    except (TypeError, ValueError) as error:
        raise UsageError(one_line(error)) from error
    for field in verb.positionals:
        if getattr(config, field) in (None, "", [], ()):
            many = takes_list(field_type(config_class, field))
            raise UsageError(
                f"{job} needs {placeholder(field, many)}: on the command line, or {field!r} in a --config file"
            )
    return config


def config_file(path: str) -> str:
    """Where a config file lies that a command line names: one that is not there, and is called as one of the project's
    own (``quickstart.yaml``, ``configs/quickstart.yaml``), is that one, also where there is no checkout.
    """
    here = Path(__file__).parent
    for folder in (here / "carried", here.parent / "configs"):  # of a wheel, and of a checkout
        own = folder / path.removeprefix("configs/")
        if not Path(path).exists() and own.is_file():
            return str(own)
    return path


def _settings_in(path: str, job: str, config_class: type) -> list[_Setting]:
    """What a YAML file sets.

    Raises:
        UsageError: the file is not a YAML mapping, or its ``job:`` line, if it has one, names another job.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such config file") from None
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable text, which is UTF-8: save it as that"
        raise UsageError(f"{path}{where}: not valid YAML: {problem}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: a config file maps keys to values; this one is {_shown(config)}")
    if config.get("job", job) != job:
        raise UsageError(f"{path} is a config for {config['job']!r}, not for {job!r}")
    return list(_settings(f"{path}: ", {key: value for key, value in config.items() if key != "job"}, config_class))


def _settings(where: str, values: Mapping[Any, Any], config_class: type, prefix: str = "") -> Iterator[_Setting]:
    """A mapping's values by dotted key, down to the fields that are no dataclasses themselves."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and _dataclass_in(field_type(config_class, key)):
            yield from _settings(where, value, config_class, f"{key}.")
        else:
            yield _Setting(where, key, value)


def _parser(package: str, name: str, verb: Verb, config_class: type) -> Any:
    from jsonargparse import SUPPRESS, ArgumentParser

    prog = f"python -m {package} {name}"
    forms = [placeholder(field, takes_list(field_type(config_class, field))) for field in verb.positionals]
    parser = ArgumentParser(
        prog=prog,
        usage=" ".join([prog, *forms, "[--config FILE] [--key value]… [--json] [--debug]"]),
        description=f"{verb.help[:1].upper()}{verb.help[1:]}.",
        epilog=EPILOG,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of these keys.")
    parser.add_argument("--job", type=str, help=SUPPRESS)  # read by launch.sh, checked above
    parser.add_class_arguments(config_class, None, as_group=False)
    return parser


def _as_list(value: str, hint: Any) -> str:
    """``a,b`` as a list literal where the field is a list; anything else as it came."""
    if not takes_list(hint) or value.lstrip().startswith("[") or value in ("null", "None"):
        return value
    items = re.split(r",(?![^{}]*\})", value) if value else []  # not at the commas of a brace range
    numbers = {member for member in typing.get_args(hint) if member in (int, float)}
    return f"[{', '.join(items)}]" if numbers else json.dumps(items)


def _init_fields(config_class: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config_class) if field.init]


def field_type(config_class: type, key: str) -> Any:
    """Type of what stands under a dotted key: a field, or a dict's item; None where there is no such thing."""
    hint: Any = config_class
    for name in key.removesuffix("+").split("."):
        owner = _dataclass_in(hint)
        if owner is not None:
            hint = typing.get_type_hints(owner).get(name)
        else:
            hint = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
    return hint


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that a field holds, perhaps among other things; None where it holds none."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((member for member in members if dataclasses.is_dataclass(member)), None)


def takes_list(hint: Any) -> bool:
    """Whether a field holds a list or tuple (perhaps optional), and not plain text as well."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if str in members:
        return False
    return any((typing.get_origin(member) or member) in (list, tuple, Sequence) for member in members)


def _keys(config_class: Any, prefix: str = "") -> Iterator[str]:
    for field in _init_fields(config_class):
        yield prefix + field.name
        inner = _dataclass_in(field_type(config_class, field.name))
        if inner is not None:
            yield from _keys(inner, f"{prefix}{field.name}.")


def load(reference: str) -> Any:
    """The thing that ``"module:name"`` names; its module is imported."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _fault(config_class: type, given: Sequence[_Setting], job: str) -> str | None:
    """What is wrong with a configuration that the parser refuses, in one line; None where that is not seen here.

    Settings are taken one by one, each by a parser of its own field: so the key, its file and the value are known,
    and nothing is read out of the library's messages.
    """
    for where, key, value in given:
        hint = field_type(config_class, key)
        if hint is None or (key.endswith("+") and not takes_list(hint)):
            guess = did_you_mean(key, list(_keys(config_class)))
            return f"{where}unknown key {key!r}{guess}; python -m {job} --help lists the keys"
        append = "+" if key.endswith("+") else ""
        if not _takes(hint, {"value": value} if where else f"--value{append}={_as_list(value, hint)}"):
            return f"{where}{key.removesuffix('+')}: expected {_type_name(hint)}, got {value}"
    set_keys = {key.partition(".")[0].removesuffix("+") for _, key, _ in given}
    missing = [
        f"--{field.name}"
        for field in _init_fields(config_class)
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in set_keys
    ]
    return f"{job} needs {', '.join(missing)}: on the command line, or in a --config file" if missing else None


def _takes(hint: Any, given: str | dict[str, Any]) -> bool:
    """Whether an option ``--value`` of this type takes an argument of the command line, or a mapping from a file."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        parser.parse_args([given]) if isinstance(given, str) else parser.parse_object(given)
    except ArgumentError:
        return False
    return True


def _type_name(hint: Any) -> str:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, members))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(member) for member in members)
    if origin in (list, tuple, Sequence):
        return f"a list of {_type_name(members[0])}" if members else "a list"
    if origin is typing.Annotated:
        return _type_name(members[0])
    if dataclasses.is_dataclass(hint):
        return f"a mapping with the keys {', '.join(_keys(hint))}"
    return getattr(hint, "__name__", str(hint))


def did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The known word that is nearest to one that is not, as the end of a message; empty where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _shown(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"

