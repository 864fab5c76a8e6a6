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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from afresh.errors import UsageError, one_line

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
        help: one line for the list of verbs.
        positionals: fields given by position, in order; at most one of them is a list.
    """

    config: str
    job: str
    help: str
    positionals: tuple[str, ...] = ()


@dataclass
class Options:
    settings: list[tuple[str, str]]  # (dotted key, value), in the order given
    configs: list[str]
    passed: list[str]  # --help, --print_config
    json: bool = False
    check: bool = False


def metavar(field: str, many: bool) -> str:
    return field.upper() + ("…" if many else "")


def read_config(package: str, name: str, verb: Verb, options: Options) -> Any:
    """The verb's dataclass, filled from defaults, config files and settings, in that order.

    Raises:
        UsageError: a missing or malformed file, an unknown or ill-typed key, a config of another job.
    """
    from argparse import ArgumentError

    job, config_class = f"{package} {name}", load(verb.config)
    given = [_Given(f"{path}: ", *item) for path in options.configs for item in _leaves(_read(path, job), config_class)]
    given += [_Given("", key.removesuffix("+"), value) for key, value in options.settings]
    known = list(_keys(config_class))
    for one in given:
        if hint_of(config_class, one.key) is None:
            guess = guessed(one.key, known)
            raise UsageError(f"{one.source}unknown key {one.key!r}{guess}; python -m {job} --help lists the keys")
    parser = _parser(package, name, verb, config_class)
    argv = [f"--config={path}" for path in options.configs]
    for key, value in options.settings:
        argv.append(f"--{key}={as_list(value, hint_of(config_class, key))}")
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            namespace = parser.parse_args(argv + options.passed)
    except ArgumentError as error:
        raise UsageError(_complaint(given, config_class, job) or one_line(error)) from None
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
            many = is_list(hint_of(config_class, field))
            raise UsageError(
                f"{job} needs {metavar(field, many)}: on the command line, or {field!r} in a --config file"
            )
    return config


@dataclass(frozen=True)
class _Given:
    source: str  # what a complaint begins with: the file, nothing for the command line
    key: str
    value: Any


def _leaves(mapping: Mapping[str, Any], config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a config file, down to where the dataclasses end."""
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        hint = hint_of(config_class, key)
        if isinstance(value, Mapping) and any(map(dataclasses.is_dataclass, (hint, *typing.get_args(hint)))):
            yield from _leaves(value, config_class, f"{key}.")
        else:
            yield key, value


def _complaint(given: Sequence[_Given], config_class: Any, job: str) -> str | None:
    """What is wrong with what was given, each value asked for by itself; None if it is not found that way."""
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    for one in given:
        hint = hint_of(config_class, one.key)
        alone = ArgumentParser(exit_on_error=False, default_env=False)
        alone.add_argument("--value", type=hint)
        try:
            if one.source:
                alone.parse_object({"value": one.value})
            else:
                alone.parse_args([f"--value={as_list(one.value, hint)}"])
        except ArgumentError:
            return f"{one.source}{one.key}: expected {_type_name(hint)}, got {one.value}"
    keys = {one.key.partition(".")[0] for one in given}
    needed = [field.name for field in _init_fields(config_class) if _is_required(field) and field.name not in keys]
    if needed:
        options = ", ".join(f"--{name}" for name in needed)
        return f"{job} needs {options}: on the command line, or in a --config file"
    return None


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _read(path: str, job: str) -> dict[str, Any]:
    """A config file's mapping but for its ``job:`` line, which names this job if it is there.

    Raises:
        UsageError: it is missing, no YAML mapping, or of another job.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such config file") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not readable text"
        raise UsageError(f"{path}{where}: not valid YAML: {problem}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: a config file maps keys to values; this one is {_shown(config)}")
    named = config.pop("job", job)
    if named != job:
        raise UsageError(f"{path} is a config for {named!r}, not for {job!r}")
    return config


def _parser(package: str, name: str, verb: Verb, config_class: type) -> Any:
    from jsonargparse import SUPPRESS, ArgumentParser

    prog = f"python -m {package} {name}"
    forms = [metavar(field, is_list(hint_of(config_class, field))) for field in verb.positionals]
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


def as_list(value: str, hint: Any) -> str:
    """``a,b`` as a list literal where the field is a list; anything else as it came."""
    if not is_list(hint) or value.lstrip().startswith("[") or value in ("null", "None"):
        return value
    items = re.split(r",(?![^{}]*\})", value) if value else []  # not at the commas of a brace range
    numbers = {member for member in typing.get_args(hint) if member in (int, float)}
    return f"[{', '.join(items)}]" if numbers else json.dumps(items)


def _init_fields(config_class: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config_class) if field.init]


def hint_of(config_class: Any, key: str) -> Any:
    """Type of the field under a dotted key; None where there is no such field."""
    hint = config_class
    for name in key.split("."):
        owners = [member for member in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(member)]
        if not owners:
            return None
        hint = typing.get_type_hints(owners[0]).get(name)
    return hint


def is_list(hint: Any) -> bool:
    """Whether a field holds a list or tuple (perhaps optional), and not plain text as well."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if str in members:
        return False
    return any((typing.get_origin(member) or member) in (list, tuple, Sequence) for member in members)


def _keys(config_class: Any, prefix: str = "") -> Iterator[str]:
    for field in _init_fields(config_class):
        yield prefix + field.name
        hint = hint_of(config_class, field.name)
        for member in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(member):
                yield from _keys(member, f"{prefix}{field.name}.")


def load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


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


def guessed(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _shown(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"

