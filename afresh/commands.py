"""How ``afresh-curate VERB`` and ``afresh-train VERB`` work: one verb, one dataclass, one job function.

A command line is turned into the verb's dataclass (defaults, then ``--config FILE``, then ``--key value``),
the dataclass is handed to the job, and the job's summary is printed. Only the chosen verb's modules are
imported, so that help answers at once. Exit codes: 0 success, 1 failure, 2 bad usage or configuration,
130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

from afresh import __version__
from afresh.configs import (
    Options,
    Verb,
    config_file,
    did_you_mean,
    field_type,
    load,
    placeholder,
    read_config,
    takes_list,
)
from afresh.cores import share_the_machine
from afresh.errors import UsageError, UserError, one_line, printable
from afresh.progress import is_main_process
from afresh.summaries import as_json, as_text

FLAGS = (
    "-h",
    "--help",
    "--print_config",
    "--check_config",
    "--json",
    "--debug",
)  # options that take no value of their own


def run(package: str, description: str, verbs: Mapping[str, Verb], argv: Sequence[str] | None = None) -> int:
    """Run one command line of ``package`` and return its exit code.

    Args:
        package: ``"curate"`` or ``"train"``.
        description: first line of the help.
        verbs: the package's verbs by name.
        argv: arguments after the program's name; ``sys.argv[1:]`` by default.
    """
    share_the_machine()  # before anything loads torch
    argv = list(sys.argv[1:] if argv is None else argv)
    script = f"afresh-{package}"
    prog = script if Path(sys.argv[0]).stem == script else f"python -m {package}"
    try:
        _refuse_namesakes(script)
        if not argv or argv[0] in ("-h", "--help"):
            print(_help(prog, description, verbs), file=sys.stdout if argv else sys.stderr)
            return 0 if argv else 2
        if argv[0] == "--version":
            print(f"afresh {__version__}")
            return 0
        name = argv[0]
        if name not in verbs:
            raise UsageError(f"unknown verb {name!r}{did_you_mean(name, verbs)}; {prog} --help lists the verbs")
        options = _split(verbs[name], argv[1:], f"{prog} {name}")
        config = read_config(package, name, verbs[name], options)
        if verbs[name].check:
            load(verbs[name].check)(config)
        if options.check:
            return 0
        with _stdout_kept_for_the_summary(options.json):
            summary = load(verbs[name].job)(config)
        if summary is not None and is_main_process():
            print(as_json(summary) if options.json else as_text(summary), flush=True)
        return getattr(summary, "exit_code", 0)  # a check that found problems says so by its exit code
    except SystemExit as stop:  # --help and --print_config end this way
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {printable(one_line(error))}", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else 1


def _refuse_namesakes(script: str) -> None:
    """See that ``curate`` and ``train`` are the packages that belong to this one: ``python -m`` looks first into the
    working folder, where somebody may have a file of that name.

    Raises:
        UsageError: another file is found under one of the names.
    """
    here = Path(__file__).resolve().parent.parent
    for name in ("curate", "train"):
        found = find_spec(name)
        where = "" if found is None else found.origin or ""
        if Path(where).resolve().parent.parent != here:
            raise UsageError(
                f"{where or 'nothing'} is found in the place of the package {name}: start {script}, which does not "
                "look into the working folder, or rename that file"
            )


def _split(verb: Verb, argv: Sequence[str], prog: str) -> Options:
    """Sort a verb's arguments into settings, config files and flags; positions become settings.

    Every option but the flags takes exactly one value, so options and positions may come in any order; one that is
    true or false may stand without, before another option or at the end, and is true.
    """
    options = Options([], [], [])
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
                if rest and not rest[0].startswith("--"):
                    value = rest.pop(0)
                elif key != "config" and field_type(load(verb.config), key) is bool:
                    value = "true"
                else:
                    raise UsageError(f"--{key} needs a value: --{key} VALUE, or --{key}=VALUE")
            if key == "config":
                options.configs.append(config_file(value))
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
    lists = [takes_list(field_type(load(verb.config), field)) for field in fields]
    if len(positions) < len(fields) or (len(positions) > len(fields) and not any(lists)):
        form = " ".join(placeholder(field, many) for field, many in zip(fields, lists, strict=True))
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


def _help(prog: str, description: str, verbs: Mapping[str, Verb]) -> str:
    width = max(map(len, verbs))
    lines = [f"usage: {prog} VERB [--config FILE] [--key value]… [--json] [--debug]", "", description, ""]
    lines += [f"  {name:<{width}}  {verb.help}" for name, verb in verbs.items()]
    lines += ["", f"{prog} VERB --help lists a verb's keys; --print_config prints them with their values."]
    return "\n".join(lines)


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

