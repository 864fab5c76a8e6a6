"""What is wrong with a configuration is said of its own key, value and file, and never by the parser's words."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import pytest

from afresh import commands, configs


@dataclass
class Inner:
    tau: float = 2.0


@dataclass
class Entry:
    path: str
    times: int = 1


@dataclass
class Config:
    shards: list[str | Entry] = field(default_factory=list)
    rate: float = 0.5
    size: int = 1
    sides: tuple[float, float] | None = None
    names: dict[str, str] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None


def job(config: Config) -> dict:
    return {"config": repr(config)}


@pytest.fixture
def say(monkeypatch, capsys, tmp_path):
    """Exit code and what a verb over the dataclass above says on stderr, or on stdout when all is well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "config_double", sys.modules[__name__])
    verbs = {"try": configs.Verb("config_double:Config", "config_double:job", "try it")}

    def run(*argv: str) -> tuple[int, str]:
        code = commands.run("curate", "A trial.", verbs, ["try", *argv])
        out, err = capsys.readouterr()
        return code, (err or out).strip()

    return run


def test_of_two_config_files_the_one_at_fault_is_named(say, tmp_path):
    (tmp_path / "good.yaml").write_text("rate: 5e-1\nsize: 3\n")
    (tmp_path / "bad.yaml").write_text("rate: 5e-1\nsize: three\n")
    said = say("--config", "good.yaml", "--config", "bad.yaml")
    assert said == (2, "error: bad.yaml: size: expected int, got three")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("inner: {tau: hot}", "c.yaml: inner.tau: expected float, got hot"),
        ("other: {tau: hot}", "c.yaml: other.tau: expected float, got hot"),
        ("other: {tao: 1}", "c.yaml: unknown key 'other.tao' (did you mean 'other.tau'?)"),
        ("sides: [1, a]", "c.yaml: sides: expected a list of float or null, got [1, 'a']"),
        ("shards: a.tar,b.tar", "c.yaml: shards: expected a list of str or a mapping with the keys path, times"),
        ("shards: [{path: a, time: 2}]", "c.yaml: shards: expected a list of str or a mapping with the keys"),
        ("names: [a]", "c.yaml: names: expected dict, got ['a']"),
        ("1: 2", "c.yaml: unknown key '1'"),
    ],
)
def test_a_config_files_fault_is_named_by_its_dotted_key(say, tmp_path, text, line):
    (tmp_path / "c.yaml").write_text(text + "\n")
    code, said = say("--config", "c.yaml")
    assert code == 2 and said.startswith(f"error: {line}") and "\n" not in said


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--sides", "1,b"], "sides: expected a list of float or null, got 1,b"),
        (["--rate.low", "1"], "unknown key 'rate.low'"),
        (["--size+", "1"], "unknown key 'size+' (did you mean 'size'?)"),
        (["--inner", "3"], "inner: expected a mapping with the keys tau, got 3"),
    ],
)
def test_a_command_lines_fault_is_named_by_its_option(say, argv, line):
    code, said = say(*argv)
    assert code == 2 and said.startswith(f"error: {line}") and "\n" not in said


def test_what_is_right_is_taken_in_every_spelling(say, tmp_path):
    (tmp_path / "c.yaml").write_text("rate: 5e-1\nsides: [1, 2]\nnames: {a: b}\nother: {tau: 1}\nshards: [{path: x}]\n")
    code, said = say("--config", "c.yaml", "--shards+", "y", "--names.c", "d", "--inner.tau=3")
    assert code == 0
    for part in ("rate=0.5", "sides=(1.0, 2.0)", "'a': 'b'", "'c': 'd'", "tau=3.0", "Entry(path='x'", "'y'"):
        assert part in said


def test_the_fault_is_found_behind_what_is_right(say, tmp_path):
    (tmp_path / "c.yaml").write_text("rate: 5e-1\nsides: [1, 2]\nnames: {a: b}\nother: {tau: 1}\nshards: [{path: x}]\n")
    code, said = say("--config", "c.yaml", "--shards+", "y", "--names.c", "d", "--inner.tau=3", "--size=big")
    assert (code, said) == (2, "error: size: expected int, got big")
