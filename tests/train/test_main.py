"""How a process ends."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import atexit, sys, types
sys.modules["torch.distributed"] = types.ModuleType("torch.distributed")
from train.__main__ import end
class Last:
    def __del__(self):
        print("taken apart", flush=True)
kept = Last()
atexit.register(lambda: print("at exit"))
print("said", end=" ")
end(3)
"""


@pytest.mark.parametrize(("processes", "rest"), [("2", "said at exit\n"), ("1", "said at exit\ntaken apart\n")])
def test_one_of_several_processes_keeps_its_code_and_words_and_is_not_taken_apart(processes, rest):
    env = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": processes}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (3, rest)


@pytest.mark.parametrize(("verb", "listened"), [("finetune", 1), ("detect", 0)])
def test_the_console_script_listens_for_signals_while_a_training_run_is_loaded(verb, listened, monkeypatch):
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["afresh-train"]
    module, function = target.split(":")
    main = importlib.import_module(module)
    heard: list[int] = []
    monkeypatch.setattr(main, "listen", lambda: heard.append(1))
    monkeypatch.setattr(sys, "argv", ["afresh-train", verb, "--help"])
    with pytest.raises(SystemExit) as ended:
        getattr(main, function)()
    assert ended.value.code == 0 and len(heard) == listened
