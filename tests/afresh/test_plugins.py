"""Parts of one's own by name: what they are, and what is said where there are none."""

from __future__ import annotations

import sys

import pytest

from afresh import plugins
from afresh.errors import UsageError

FILE = """
import sys

VALUE = 7

class Whole:
    def work(self): ...

class Needy:
    def __init__(self, size): ...

def makes_one():
    return Whole()

def works(): ...
works.work = works

ready = Whole()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with files that are gone from Python's memory afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "own_a.py").write_text(FILE)
    (tmp_path / "own_b.py").write_text("import own_nowhere\n")
    (tmp_path / "own_c.py").write_text("1 / 0\n")
    (tmp_path / "own_d").mkdir()
    (tmp_path / "own_d" / "__init__.py").write_text("")
    (tmp_path / "own_d" / "inner.py").write_text(FILE)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def made(name, *arguments):
    return plugins.make("afresh.none", name, "option", ["work"], "some.Protocol", *arguments)


@pytest.mark.parametrize("name", ["Whole", "makes_one", "works", "ready"])
def test_classes_functions_and_objects_become_parts(folder, name):
    assert hasattr(made(f"own_a:{name}"), "work")
    assert hasattr(made(f"own_d.inner:{name}"), "work")


def test_what_is_no_reference_means_nothing(folder):
    for name in ("greedy", "a b:c", "a:", ":b", "models/clip.pt", "C:\\models", "s3://bucket/x", "own_a:Whole:x", ""):
        assert plugins.find("afresh.none", name, "option") is None


@pytest.mark.parametrize(
    ("name", "needle"),
    [
        ("own_nowhere:Part", "option 'own_nowhere:Part' cannot be imported: ModuleNotFoundError"),
        ("own_b:Part", "No module named 'own_nowhere'"),
        ("own_c:Part", "ZeroDivisionError"),
        ("own_a:Part", "there is no 'Part' in "),
        ("own_a:Needy", "option 'own_a:Needy' cannot be made: "),
        ("own_a:VALUE", "option 'own_a:VALUE' lacks work: see some.Protocol"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(folder, name, needle):
    with pytest.raises(UsageError) as caught:
        made(name)
    assert needle in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_the_working_folder_stands_in_for_no_module(folder):
    (folder / "wave.py").write_text("raise SystemExit('shadowed')")
    import wave

    assert plugins.find("afresh.none", "wave:open", "option") is wave.open


def test_the_identity_of_a_part_is_its_digest_or_its_file(folder):
    one, other = made("own_a:Whole"), made("own_d.inner:Whole")
    assert plugins.identity(one) == plugins.identity(made("own_a:ready"))
    assert plugins.identity(one) != plugins.identity(other)  # another module
    one.digest = "weights 3"
    assert plugins.identity(one) == "weights 3"


def test_the_identity_of_a_part_changes_with_its_file(folder):
    before = plugins.identity(made("own_a:Whole"))
    del sys.modules["own_a"]
    plugins._code.cache_clear()
    (folder / "own_a.py").write_text(FILE + "# changed\n")
    assert plugins.identity(made("own_a:Whole")) != before
