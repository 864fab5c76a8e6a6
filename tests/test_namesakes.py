"""A user's own ``train.py`` or ``curate.py`` in the working folder: nobody's code runs in the place of ours unsaid."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from afresh.configs import config_file

ROOT = Path(__file__).resolve().parent.parent
OWN = "raise SystemExit('own file')\n"


def run(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def script_of(package: str) -> list[str]:
    """What the console script of a package does, whether or not it is installed here."""
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][f"afresh-{package}"]
    module, function = target.split(":")
    code = f"import sys; sys.argv[0] = 'afresh-{package}'; from {module} import {function}; sys.exit({function}())"
    return [sys.executable, "-P", "-c", code]


@pytest.mark.parametrize("package", ["curate", "train"])
def test_console_scripts_do_not_look_into_the_working_folder(package, tmp_path):
    for name in ("train.py", "curate.py", "afresh.py"):
        (tmp_path / name).write_text(OWN)
    done = run(*script_of(package), "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: afresh-{package} VERB"), done.stderr


@pytest.mark.parametrize(("package", "own"), [("train", "curate.py"), ("curate", "train.py")])
def test_a_file_in_the_place_of_a_package_is_named(package, own, tmp_path):
    (tmp_path / own).write_text(OWN)
    done = run(sys.executable, "-m", package, "--help", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert str(tmp_path / own) in done.stderr and f"start afresh-{package}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_without_python_in_it_stands_in_nobodys_place(tmp_path):
    (tmp_path / "curate").mkdir()
    (tmp_path / "train").mkdir()
    assert run(sys.executable, "-m", "train", "--version", cwd=tmp_path).returncode == 0


def environment(folder: Path) -> Path:
    """An environment that runs this one's python and counts as installed, so that the launcher installs nothing."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    digest = hashlib.sha256(str(ROOT).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    (folder / ".afresh-installed").write_text(f"{digest.hexdigest()}\nextra:\n")
    return folder


def test_the_launcher_starts_the_project_beside_it(tmp_path):
    for name in ("train.py", "curate.py"):
        (tmp_path / name).write_text(OWN)
    (tmp_path / "job.yaml").write_text("job: curate check\nshards: [nowhere.tar]\n")
    env = {"VIRTUAL_ENV": str(environment(tmp_path / "env")), "PIP_NO_INDEX": "1"}
    done = run(str(ROOT / "launch.sh"), "job.yaml", cwd=tmp_path, **env)
    assert "nowhere.tar" in done.stderr and "own file" not in done.stderr, done.stderr
    assert "installing" not in done.stderr


def test_a_config_of_the_projects_own_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart.yaml", "configs/quickstart.yaml"):
        assert Path(config_file(name)) == ROOT / "configs" / "quickstart.yaml"
    assert config_file("nowhere.yaml") == "nowhere.yaml"
    (tmp_path / "quickstart.yaml").write_text("job: train quickstart\n")
    assert config_file("quickstart.yaml") == "quickstart.yaml"  # the user's own goes first
