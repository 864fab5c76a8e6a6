"""Command lines: positions, options and config files make one config; whatever is wrong ends in one line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from afresh import commands, configs, errors
from curate import cli as curate_cli


@dataclass
class Filter:
    tau: float = 2.0


@dataclass
class Config:
    shards: list[str] = field(default_factory=list)
    out: str = ""
    threshold: float = 0.9
    limit: int | None = None
    engine: Literal["local", "ray"] = "local"
    signals: tuple[str, ...] = ("magnitude",)
    sizes: list[int] = field(default_factory=list)
    filter: Filter = field(default_factory=Filter)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold lies in [0, 1]: got {self.threshold}")


def job(config: Config) -> dict:
    print("a library talks on stdout")
    os.system("echo a subprocess talks on stdout")
    if config.out == "fail":
        raise errors.UserError("shards/000003.tar: truncated after sample 'cat'")
    if config.out == "defect":
        raise RuntimeError("two\nlines")
    if config.out == "denied":
        open("/nonexistent/folder/file").close()
    if config.out == "interrupt":
        raise KeyboardInterrupt
    return {"shards": config.shards, "out": config.out, "config": repr(config), "loss": float("nan")}


@pytest.fixture
def tool(monkeypatch, capfd, tmp_path):
    """``tool("a.tar", "out", ...)`` runs a verb over the dataclass above: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "project_test_double", sys.modules[__name__])
    verbs = {
        "dedup": configs.Verb(
            "project_test_double:Config", "project_test_double:job", "try it", positionals=("shards", "out")
        )
    }

    def run(*argv: str) -> tuple[int, str, str]:
        code = commands.run("curate", "A trial.", verbs, ["dedup", *argv])
        sys.stdout.flush()
        return (code, *capfd.readouterr())

    return run


def as_json(result: tuple[int, str, str]) -> dict:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_the_last_position_is_the_output_and_options_may_stand_anywhere(tool):
    summary = as_json(tool("a.tar", "--threshold", "0.5", "b.tar", "out", "--json"))
    assert summary["shards"] == ["a.tar", "b.tar"] and summary["out"] == "out"
    assert "threshold=0.5" in summary["config"]


def test_positions_may_come_from_the_config_instead(tool, tmp_path):
    (tmp_path / "c.yaml").write_text("job: curate dedup\nshards: [x.tar]\nout: there\nthreshold: 5e-1\n")
    summary = as_json(tool("--config", "c.yaml", "--json"))
    assert (
        summary["shards"] == ["x.tar"] and summary["out"] == "there" and "threshold=0.5" in summary["config"]
    )


def test_the_command_line_overrides_the_config_whatever_the_order(tool, tmp_path):
    (tmp_path / "c.yaml").write_text("shards: [x.tar]\nout: there\nfilter: {tau: 3}\n")
    summary = as_json(tool("--filter.tau", "4", "--out", "here", "--config", "c.yaml", "--json"))
    assert summary["out"] == "here" and "tau=4.0" in summary["config"]
    assert as_json(tool("y.tar", "here", "--config", "c.yaml", "--json"))["shards"] == ["y.tar"]


def test_a_position_named_by_its_option_leaves_the_rest_to_the_others(tool):
    assert as_json(tool("a.tar", "b.tar", "--out", "o", "--json"))["shards"] == ["a.tar", "b.tar"]


def test_lists_are_given_with_commas_and_brace_ranges_stay_whole(tool):
    summary = as_json(
        tool("--shards", "a{0,1}.tar,b.tar", "--out", "o", "--signals=m,n", "--sizes", "1,2", "--json")
    )
    assert summary["shards"] == ["a{0,1}.tar", "b.tar"]
    assert "signals=('m', 'n'), sizes=[1, 2]" in summary["config"]


def test_json_keeps_stdout_for_the_summary_alone(tool):
    code, out, err = tool("a", "o", "--json")
    assert code == 0 and json.loads(out)["loss"] is None  # NaN has no JSON form
    assert "a library talks" in err and "a subprocess talks" in err


def test_the_summary_is_aligned_without_json(tool):
    code, out, _ = tool("a", "o")
    assert code == 0 and "\nout     o\n" in out and "\nloss    –\n" in out


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        (["a", "o", "--thresold", "1"], "thresold' (did you mean 'threshold'?)"),
        (["a", "o", "--thresh", "0.1"], "unknown key 'thresh'"),
        (["a", "o", "--filter.tow", "1"], "filter.tow"),
        (["a", "o", "--threshold", "high"], "threshold: expected float, got high"),
        (["a", "o", "--limit", "x"], "limit: expected int or null, got x"),
        (["a", "o", "--engine", "spark"], "engine: expected one of local, ray, got spark"),
        (["a", "o", "--threshold", "3"], "threshold lies in [0, 1]"),
        (["a", "o", "--threshold"], "--threshold needs a value"),
        (["a", "o", "--threshold", "--json"], "--threshold needs a value"),
        (["a", "o", "-t", "1"], "unknown option '-t'"),
        (["a", "o", "--job", "train sample"], "unknown key 'job'"),
        (["only-one"], "SHARDS… OUT"),
        ([], "needs SHARDS…"),
        (["--shards", "a"], "needs OUT"),
        (["a", "--shards", "b", "--out", "o"], "unexpected argument 'a'"),
        (["--config", "none.yaml"], "none.yaml: there is no such config file"),
        (["--config", "."], "Is a directory"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(tool, argv, needle):
    code, out, err = tool(*argv)
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and needle in err


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("bogus: 1\n", "c.yaml: unknown key 'bogus'"),
        ("filter: {tao: 1}\n", "c.yaml: unknown key 'filter.tao' (did you mean 'filter.tau'?)"),
        ("threshold: high\n", "c.yaml: threshold: expected float, got high"),
        ("job: train sample\n", "c.yaml is a config for 'train sample', not for 'curate dedup'"),
        ("a: [1\n", "c.yaml, line 2: not valid YAML"),
        ("rule: caf\xe9\n".encode("cp1252"), "c.yaml: not valid YAML: not readable text, which is UTF-8"),
        ("threshold: 1\n".encode("utf-16"), "c.yaml: not valid YAML: not readable text, which is UTF-8"),
        ("- a\n", "c.yaml: a config file maps keys to values; this one is a list"),
        ("", "c.yaml: a config file maps keys to values; this one is empty"),
    ],
)
def test_a_bad_config_file_is_named_with_its_key(tool, tmp_path, text, needle):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, err = tool("a", "o", "--config", "c.yaml")
    assert code == 2 and len(err.splitlines()) == 1 and needle in err


@pytest.mark.parametrize(
    ("out", "code", "line"),
    [
        ("fail", 1, "error: shards/000003.tar: truncated after sample 'cat'"),
        ("defect", 1, "error: RuntimeError: two lines"),
        ("denied", 1, "error: /nonexistent/folder/file: No such file or directory"),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_a_failing_job_ends_with_one_line(tool, out, code, line):
    got, _, err = tool("a", out, "--json")
    assert got == code and err.splitlines()[-1] == line and "Traceback" not in err


def test_check_config_stops_before_the_job(tool):
    assert tool("a", "fail", "--check_config") == (0, "", "")
    assert tool("a", "--check_config")[0] == 2


def test_debug_adds_the_traceback(tool):
    code, _, err = tool("a", "fail", "--debug")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("error: shards/000003.tar")


@dataclass
class Strict:
    model: str
    out: str
    seed: int = 0


def test_keys_without_a_default_are_asked_for_together(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "project_test_double", sys.modules[__name__])
    verbs = {"sample": configs.Verb("project_test_double:Strict", "project_test_double:job", "try it")}
    assert commands.run("train", "A trial.", verbs, ["sample", "--seed", "1"]) == 2
    line = "error: train sample needs --model, --out: on the command line, or in a --config file\n"
    assert capsys.readouterr().err == line


def test_an_unknown_verb_is_bad_usage(capsys):
    assert curate_cli.main(["dedupe"]) == 2
    assert "did you mean 'dedup'" in capsys.readouterr().err
