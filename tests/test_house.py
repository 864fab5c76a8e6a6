"""The house as docs/design.md draws it: who may import whom, how high it is, and how large a room gets."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("afresh", "curate", "train")
MOST_FLOORS, MOST_FILES, MOST_LINES, MOST_OF_A_FUNCTION = 7, 12, 450, 80
THE_TRAINING_STEP = "train/finetune/loop.py:train"


def sources(*packages: str) -> list[str]:
    """Files below the root, as ``curate/reading/tar.py``."""
    found = (path for package in packages for path in (ROOT / package).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def is_face(path: str) -> bool:
    """A room's ``__init__.py`` hands names on, lazily and for others: it is no part of the walls."""
    return path.endswith("__init__.py")


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def imports() -> dict[str, frozenset[str]]:
    """File → files that it imports, whenever it does so; packages' faces left out."""
    modules = {module_of(path): path for path in sources(*PACKAGES)}
    found = {}
    for path in sources(*PACKAGES):
        names: set[str] = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[path] = frozenset(modules[name] for name in names & modules.keys()) - {path}
    return {path: frozenset(to for to in of if not is_face(to)) for path, of in found.items() if not is_face(path)}


@cache
def drawn() -> dict[str, list[list[str]]]:
    """The pictures of docs/design.md: package or room → floors from the ground up, each a list of files and folders."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    pictures = {}
    for title, block in re.findall(r"^    floors of (\S+)\n((?:    .*\n)+)", text, re.MULTILINE):
        rows = [line.split() for line in block.splitlines()]
        assert [int(row[0]) for row in rows] == list(range(len(rows), 0, -1)), f"floors of {title} are misnumbered"
        pictures[title] = [row[1:] for row in reversed(rows)]
    return pictures


def floor_of(path: str, picture: list[list[str]], base: str) -> int | None:
    """On which floor a file stands, from 1; None if it is not in the picture."""
    for number, names in enumerate(picture, 1):
        for name in names:
            at = f"{base}{name}"
            if path == at or (at.endswith("/") and path.startswith(at)):
                return number
    return None


def rooms() -> list[tuple[str, str]]:
    """``(title, folder with a slash)`` of each picture; that of the whole house has the empty folder."""
    return [(title, "" if title == "the-house" else f"{title}/") for title in drawn()]


def test_the_pictures_are_there():
    assert {title for title, _ in rooms()} >= {
        "the-house", "curate", "train/denoising", "train/memorization", "train/sampling", "train/finetune",
        "train/evaluation",
    }  # fmt: skip


@pytest.mark.parametrize(("title", "base"), rooms())
def test_every_file_stands_on_a_floor_and_imports_run_down(title, base):
    picture = drawn()[title]
    assert len(picture) <= MOST_FLOORS
    for path, imported in imports().items():
        if not path.startswith(base):
            continue
        own = floor_of(path, picture, base)
        assert own is not None, f"{path} is in no room of the picture of {title}"
        for other in imported:
            if not other.startswith(base):
                continue
            below = floor_of(other, picture, base)
            room = {at for at in (f"{base}{name}" for names in picture for name in names) if path.startswith(at)}
            if any(other.startswith(at) for at in room):
                continue  # inside one room
            assert below is not None and below < own, f"{path} (floor {own}) imports {other} (floor {below})"


@pytest.mark.parametrize(("title", "base"), rooms())
def test_the_pictures_name_what_exists(title, base):
    for names in drawn()[title]:
        for name in names:
            assert (ROOT / base / name).exists(), f"the picture of {title} names {name}"


def test_no_two_files_import_each_other_in_a_circle():
    graph = imports()
    done: set[str] = set()

    def walk(path: str, way: tuple[str, ...]) -> None:
        assert path not in way, f"a circle: {' → '.join([*way[way.index(path):], path])}"
        if path not in done:
            for other in sorted(graph[path]):
                walk(other, (*way, path))
            done.add(path)

    for path in graph:
        walk(path, ())


def test_settings_import_nothing_heavy():
    """Those of a job stand beside it, as plain dataclasses: help and configuration answer at once."""
    light = {"__future__", "dataclasses", "typing", "collections.abc"}
    for path in sources(*PACKAGES):
        if not path.endswith("/config.py"):
            continue
        for node in tree(path).body:
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if isinstance(node, ast.Import | ast.ImportFrom):
                own = str(module).startswith(PACKAGES) and (str(module).endswith(".config") or "errors" in str(module))
                assert module in light or own, f"{path} imports {ast.unparse(node)}"


def test_nobody_but_its_family_calls_a_network_encodes_a_prompt_or_reads_a_schedules_table():
    forbidden = re.compile(r"\b(unet|transformer|text_encoder)\(|\.encode_prompt\(|alphas_cumprod")
    for path in sources("train"):
        if path.startswith("train/denoising/"):
            continue
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            assert not forbidden.search(line), f"{path}:{number}: {line.strip()}"


def test_no_name_with_an_underscore_leaves_its_file():
    for path in sources(*PACKAGES):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(PACKAGES):
                names = [alias.name for alias in node.names]
                private = [name for name in names if name.startswith("_") and name != "__version__"]
                assert not private, f"{path} imports {', '.join(private)} of {node.module}"


def test_files_functions_and_rooms_stay_small():
    for path in sources(*PACKAGES, "tests", "benchmarks"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert text.count("\n") <= MOST_LINES, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and f"{path}:{node.name}" != THE_TRAINING_STEP:
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= MOST_OF_A_FUNCTION, f"{path}: {node.name} has {length} lines"
    counts = Counter(str(Path(path).parent) for path in sources(*PACKAGES) if not is_face(path))
    assert all(count <= MOST_FILES for count in counts.values()), counts.most_common(3)


def test_every_file_says_in_its_first_line_what_it_is_for():
    for path in sources(*PACKAGES):
        assert ast.get_docstring(tree(path)), f"{path} does not say what it is for"


def test_a_file_is_imported_by_somebody_or_runs_by_itself():
    """What nothing leads to is dead: the exceptions are jobs (named by text), mains, and names handed on by faces."""
    used: dict[str, int] = defaultdict(int)
    for imported in imports().values():
        for path in imported:
            used[path] += 1
    named = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in sources(*PACKAGES) if is_face(path))
    named += "\n".join((ROOT / path).read_text(encoding="utf-8") for path in ("curate/cli.py", "train/cli.py"))
    for path in imports():
        module = path.removesuffix(".py").replace("/", ".")
        text = (ROOT / path).read_text(encoding="utf-8")
        lazily = module.split(".", 2)[-1] in named or module in named
        assert used[path] or lazily or '__name__ == "__main__"' in text or module in ("curate.cli", "train.cli"), path
