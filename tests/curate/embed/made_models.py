"""What the tests of towers share: sizes, changed copies of model folders, and a Python without some packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def without(source: Path, target: Path, *names: str) -> Path:
    """A copy of a model folder that lacks some files."""
    shutil.copytree(source, target)
    for name in names:
        (target / name).unlink()
    return target


BLOCKER = """
import sys
class Blocked:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {blocked!r}:
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Blocked(finder) for finder in sys.meta_path]
"""


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}
    )
