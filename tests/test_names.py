"""Names of our own modules, files and functions, wherever a text mentions them, name something that is there."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from afresh import plugins

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("afresh", "curate", "train", "benchmarks")
SOURCES = {package: sorted((ROOT / package).rglob("*.py")) for package in PACKAGES}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]

ROLE = re.compile(r":(?:mod|func|class|meth|data|attr|exc):`~?([\w.]+)`")
OURS = r"(?:afresh|curate|train|benchmarks)"
DOTTED = re.compile(rf"(?<!:)`({OURS}(?:\.(?!json\b)\w+)+)(?:\(\))?`")  # not the member afresh.json of a sample
COMMAND = re.compile(rf"python -m ({OURS}(?:\.\w+)*)")
FILE = re.compile(rf"(?<![\w./-])((?:{OURS}|tests|configs|docs)/[\w/.-]+\.(?:py|md|yaml))\b")
IMPORT = re.compile(rf"^ *from ({OURS}[\w.]*) import ([\w, ]+)$", re.MULTILINE)
NEAR_BY = re.compile(r"``([\w/]+\.py)``")
GROUPS = {value for value in vars(plugins).values() if isinstance(value, str) and value.startswith("afresh.")}
THEIRS = re.compile(r"train_(text_to_image|dreambooth_lora)\w*\.py$")
"""Scripts of diffusers, beside which benchmarks run ours."""


def has(found: Any, attribute: str) -> bool:
    """Whether a class or module has an attribute, be it only declared, as a field is."""
    return hasattr(found, attribute) or attribute in getattr(found, "__annotations__", {})


def reached(found: Any, attributes: list[str]) -> bool:
    """Whether attribute after attribute leads somewhere."""
    for attribute in attributes:
        if not has(found, attribute):
            return False
        found = getattr(found, attribute, None)
    return True


@cache
def exists(name: str) -> bool:
    """Whether a dotted name is a module of ours, or what can be reached from one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ROOT.joinpath(*parts[:length])
        if module.is_dir() or module.with_suffix(".py").exists():
            return reached(importlib.import_module(".".join(parts[:length])), parts[length:])
    return False


def known(name: str, path: Path) -> bool:
    """Whether a role's target is there: by its whole name, in its module, or in a class of that module."""
    first, *_ = parts = name.split(".")
    if first in PACKAGES:
        return exists(name)
    if path.name == "__init__.py":
        path = path.parent
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    classes = [found for found in vars(module).values() if isinstance(found, type)]
    return any(reached(found, parts) for found in (module, *classes))


def lost(path: Path) -> Iterator[re.Match[str]]:
    """What a text names that is not there."""
    text = path.read_text(encoding="utf-8")
    for pattern in (DOTTED, COMMAND):
        yield from (match for match in pattern.finditer(text) if not (match[1] in GROUPS or exists(match[1])))
    yield from (match for match in FILE.finditer(text) if not (ROOT / match[1]).exists())
    if path.suffix == ".py":
        yield from (match for match in ROLE.finditer(text) if not known(match[1], path))
        rooms = path.relative_to(ROOT).parents
        for match in NEAR_BY.finditer(text):  # told from where the text stands
            if not THEIRS.search(match[1]) and not any((ROOT / room / match[1]).exists() for room in rooms):
                yield match


def told(path: Path) -> list[str]:
    """The same with the place at which it stands."""
    text = path.read_text(encoding="utf-8")
    return [f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[1]}" for match in lost(path)]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_the_sources_name_is_there(package):
    assert [name for path in SOURCES[package] for name in told(path)] == []


def test_what_documents_and_configs_name_is_there():
    assert [name for path in PAGES for name in told(path)] == []


def test_what_documents_import_can_be_imported():
    imported = [(path.name, *found) for path in PAGES for found in IMPORT.findall(path.read_text(encoding="utf-8"))]
    assert imported
    for page, module, names in imported:
        for name in names.split(","):
            assert exists(f"{module}.{name.strip()}"), f"{page}: from {module} import {name.strip()}"


def test_a_name_that_is_gone_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "curate").mkdir()
    page = tmp_path / "curate" / "page.py"
    page.write_text("See `curate.nowhere.run`, ``nowhere.py`` and curate/nowhere.py: python -m curate.nowhere\n")
    assert sorted(match[1] for match in lost(page)) == [
        "curate.nowhere", "curate.nowhere.run", "curate/nowhere.py", "nowhere.py"
    ]  # fmt: skip
