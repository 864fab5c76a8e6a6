"""How ``python -m curate VERB`` and ``python -m train VERB`` work: one verb, one dataclass, one job function.

A command line is turned into the verb's dataclass (defaults, then ``--config FILE``, then ``--key value``),
the dataclass is handed to the job, and the job's summary is printed. Only the chosen verb's modules are
imported, so that help answers at once. Exit codes: 0 success, 1 failure, 2 bad usage or configuration,
130 interrupted.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import io
import json
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from curate.console import UsageError, UserError, is_main_process, printable, to_json

FLAGS = (
    "-h",
    "--help",
    "--print_config",
    "--check_config",
    "--json",
    "--debug",
)  # options that take no value of their own

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


def run(package: str, description: str, verbs: Mapping[str, Verb], argv: Sequence[str] | None = None) -> int:
    """Run one command line of ``package`` and return its exit code.

    Args:
        package: ``"curate"`` or ``"train"``.
        description: first line of the help.
        verbs: the package's verbs by name.
        argv: arguments after the program's name; ``sys.argv[1:]`` by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = f"python -m {package}"
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_help(prog, description, verbs), file=sys.stdout if argv else sys.stderr)
            return 0 if argv else 2
        if argv[0] == "--version":
            print(f"afresh {importlib.import_module('curate').__version__}")
            return 0
        name = argv[0]
        if name not in verbs:
            raise UsageError(f"unknown verb {name!r}{_guess(name, verbs)}; {prog} --help lists the verbs")
        options = _split(verbs[name], argv[1:], f"{prog} {name}")
        config = _read_config(package, name, verbs[name], options)
        if options.check:
            return 0
        with _stdout_kept_for_the_summary(options.json):
            summary = _load(verbs[name].job)(config)
        if summary is not None and is_main_process():
            print(_as_json(summary) if options.json else _as_text(summary), flush=True)
        return getattr(summary, "exit_code", 0)  # a check that found problems says so by its exit code
    except SystemExit as stop:  # --help and --print_config end this way
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else 1


# ------------------------------------------------------------------------------------------- command line


@dataclass
class _Options:
    settings: list[tuple[str, str]]  # (dotted key, value), in the order given
    configs: list[str]
    passed: list[str]  # --help, --print_config
    json: bool = False
    check: bool = False


def _split(verb: Verb, argv: Sequence[str], prog: str) -> _Options:
    """Sort a verb's arguments into settings, config files and flags; positions become settings.

    Every option but the flags takes exactly one value, so options and positions may come in any order.
    """
    options = _Options([], [], [])
    positions: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token == "--":
            positions += rest
            break
        if token == "--json":
            options.json = True
        elif token == "--check_config":
            options.check = True
        elif token == "--debug":
            pass
        elif token in FLAGS or token.startswith("--print_config="):
            options.passed.append(token)
        elif token.startswith("--"):
            key, equals, value = token[2:].partition("=")
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise UsageError(f"--{key} needs a value: --{key} VALUE, or --{key}=VALUE")
                value = rest.pop(0)
            if key == "config":
                options.configs.append(value)
            else:
                options.settings.append((key, value))
        elif token.startswith("-") and len(token) > 1:
            raise UsageError(f"unknown option {token!r}; options are written --key value: {prog} --help")
        else:
            positions.append(token)
    given = {key.removesuffix("+") for key, _ in options.settings}  # --key+ VALUE appends to a list
    if "job" in given:
        raise UsageError("unknown key 'job': the verb names the job")
    options.settings += _name_positions(verb, positions, given, prog)
    return options


def _name_positions(verb: Verb, positions: list[str], given: set[str], prog: str) -> list[tuple[str, str]]:
    """Match arguments without a key with the verb's positional fields; a list takes what the others leave."""
    if not positions:
        return []
    fields = [field for field in verb.positionals if field not in given]
    if not fields:
        raise UsageError(f"unexpected argument {positions[0]!r}; see {prog} --help")
    lists = [_is_list(_hint(_load(verb.config), field)) for field in fields]
    if len(positions) < len(fields) or (len(positions) > len(fields) and not any(lists)):
        form = " ".join(_metavar(field, many) for field, many in zip(fields, lists, strict=True))
        raise UsageError(f"{prog} takes {form}: got {len(positions)} of them ({' '.join(positions)})")
    spare = len(positions) - len(fields)
    settings = []
    for field, many in zip(fields, lists, strict=True):
        if many:
            settings.append((field, json.dumps(positions[: spare + 1])))
            del positions[: spare + 1]
        else:
            settings.append((field, positions.pop(0)))
    return settings


def _metavar(field: str, many: bool) -> str:
    return field.upper() + ("…" if many else "")


# -------------------------------------------------------------------------------------------- configuration


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
        raise UsageError(_one_line(error)) from error
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


# ------------------------------------------------------------------------------------------------- messages


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
        return f"{where}{_one_line(message)}"
    return source + _one_line(message)


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


def _one_line(error: object) -> str:
    """An exception in one line; what the system refused is named by its path."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([" → ".join(names), error.strerror]) if names else error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, Exception) and not isinstance(error, (UserError, ValueError, TypeError)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text or type(error).__name__


def _shown(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def _help(prog: str, description: str, verbs: Mapping[str, Verb]) -> str:
    width = max(map(len, verbs))
    lines = [f"usage: {prog} VERB [--config FILE] [--key value]… [--json] [--debug]", "", description, ""]
    lines += [f"  {name:<{width}}  {verb.help}" for name, verb in verbs.items()]
    lines += ["", f"{prog} VERB --help lists a verb's keys; --print_config prints them with their values."]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- summary


@contextmanager
def _stdout_kept_for_the_summary(active: bool) -> Iterator[None]:
    """Send everything that a job and its libraries write on stdout to stderr while ``active``."""
    if not active:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        os.dup2(2, 1)  # compiled code and child processes
        with redirect_stdout(sys.stderr):  # Python's own
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _as_text(summary: Any) -> str:
    """A summary's own view, where it has one; it may be coloured on a terminal."""
    view = getattr(summary, "view", None)
    if view is None:
        return format_summary(summary)
    return view(colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def _as_json(summary: Any) -> str:
    return json.dumps(to_json(summary), ensure_ascii=False)


def format_summary(summary: Mapping[str, Any]) -> str:
    """A summary as aligned lines ``key  value``, and a table for every list of rows."""
    lines: list[tuple[str, str]] = []
    tables: list[str] = []

    def add(prefix: str, items: Mapping[str, Any]) -> None:
        for key, value in items.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{key}.", value)
            elif isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
                tables.append(_table(value))
            else:
                lines.append((f"{prefix}{key}", _cell(value)))

    add("", summary)
    width = max((len(key) for key, _ in lines), default=0)
    block = "\n".join(f"{key:<{width}}  {value}".rstrip() for key, value in lines)
    return "\n\n".join([*tables, block] if block else tables)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value != value:
            return "–"
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    return _cell(value.item()) if hasattr(value, "item") else printable(str(value))
