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
class _Options:
    settings: list[tuple[str, str]]  # (dotted key, value), in the order given
    configs: list[str]
    passed: list[str]  # --help, --print_config
    json: bool = False
    check: bool = False


def _metavar(field: str, many: bool) -> str:
    return field.upper() + ("…" if many else "")


def _read_config(package: str, name: str, verb: Verb, options: _Options) -> Any:
    """The verb's dataclass, filled from defaults, config files and settings, in that order.

    Raises:
        UsageError: a missing or malformed file, an unknown or ill-typed key, a config of another job.
    """
    from argparse import ArgumentError

    job = f"{package} {name}"
    for path in options.configs:
        _check_config_file(path, job)
    config_class = _load(verb.config)
    parser = _parser(package, name, verb, config_class)
    argv = [f"--config={path}" for path in options.configs]
    for key, value in options.settings:
        argv.append(f"--{key}={_as_list(value, _hint(config_class, key))}")
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            namespace = parser.parse_args(argv + options.passed)
    except ArgumentError as error:
        keys = {key for key, _ in options.settings}
        raise UsageError(_plain(str(error), config_class, keys, options.configs, job)) from None
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
            many = _is_list(_hint(config_class, field))
            raise UsageError(
                f"{job} needs {_metavar(field, many)}: on the command line, or {field!r} in a --config file"
            )
    return config


def _check_config_file(path: str, job: str) -> None:
    """See that the file is a YAML mapping, and that its ``job:`` line, if it has one, names this job."""
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
    if config.get("job", job) != job:
        raise UsageError(f"{path} is a config for {config['job']!r}, not for {job!r}")


def _parser(package: str, name: str, verb: Verb, config_class: type) -> Any:
    from jsonargparse import SUPPRESS, ArgumentParser

    prog = f"python -m {package} {name}"
    forms = [_metavar(field, _is_list(_hint(config_class, field))) for field in verb.positionals]
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
    if not _is_list(hint) or value.lstrip().startswith("[") or value in ("null", "None"):
        return value
    items = re.split(r",(?![^{}]*\})", value) if value else []  # not at the commas of a brace range
    numbers = {member for member in typing.get_args(hint) if member in (int, float)}
    return f"[{', '.join(items)}]" if numbers else json.dumps(items)


def _init_fields(config_class: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config_class) if field.init]


def _hint(config_class: Any, key: str) -> Any:
    """Type of the field under a dotted key; None where there is no such field."""
    hint = config_class
    for name in key.split("."):
        owners = [member for member in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(member)]
        if not owners:
            return None
        hint = typing.get_type_hints(owners[0]).get(name)
    return hint


def _is_list(hint: Any) -> bool:
    """Whether a field holds a list or tuple (perhaps optional), and not plain text as well."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if str in members:
        return False
    return any((typing.get_origin(member) or member) in (list, tuple, Sequence) for member in members)


def _keys(config_class: Any, prefix: str = "") -> Iterator[str]:
    for field in _init_fields(config_class):
        yield prefix + field.name
        hint = _hint(config_class, field.name)
        for member in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(member):
                yield from _keys(member, f"{prefix}{field.name}.")


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _plain(message: str, config_class: Any, given: set[str], configs: Sequence[str], job: str) -> str:
    """A parser's complaint as one line that names the key, and the file it came from."""
    source = f"{', '.join(configs)}: " if configs else ""
    known = list(_keys(config_class))
    unknown = (
        re.search(r"unrecognized arguments: --([^\s=]+)", message)
        or re.search(r"Group '(?P<group>[^']+)' does not accept option '([^']+)'", message)
        or re.search(r"Option '([^']+)' is not accepted", message)
    )
    if unknown:
        parts = [part for part in unknown.groups() if part]
        key = ".".join(parts)
        where = "" if message.startswith("unrecognized") else source
        return f"{where}unknown key {key!r}{_guess(key, known)}; python -m {job} --help lists the keys"
    missing = re.search(r"the following arguments are required: (.*)", message)
    if missing:
        options = ", ".join(f"--{key}" for key in missing[1].split(", "))
        return f"{job} needs {options}: on the command line, or in a --config file"
    ill_typed = re.search(r"Parser key \"([^\"]+)\"", message)
    if ill_typed:
        key = ill_typed[1]
        where = "" if key in given else source
        got = re.search(r"(?:Got value|Given value): (.*)", message)
        hint = _hint(config_class, key)
        if got and hint is not None:
            return f"{where}{key}: expected {_type_name(hint)}, got {got[1]}"
        return f"{where}{one_line(message)}"
    return source + one_line(message)


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


def _guess(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _shown(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"

