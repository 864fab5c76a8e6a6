"""Runs the code of a documentation page: what it prints must be what the page says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\w+\.py)\n")


def run_page(name: str) -> int:
    """Run a page's blocks one after the other, in the working folder; how many there were.

    Blocks of ``python`` share a namespace; one that begins with a file's name, as in ``# my_steps.py``, is written to
    that file instead. Blocks of ``sh`` have a command ``afresh-curate …`` or ``afresh-train …`` a line. One that a
    ``text`` block follows must print just that. Others are passed over.
    """
    blocks = _BLOCK.findall((ROOT / "docs" / name).read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "page"}
    count = 0
    for number, (language, code) in enumerate(blocks):
        place = f"{name}, block {number}"
        if language == "python" and (file := _FILE.match(code)):
            Path(file[1]).write_text(code, encoding="utf-8")
            printed = ""
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(code, place, "exec"), namespace)
            printed = stdout.getvalue()
        elif language == "sh":
            printed = "".join(_command(line, place) for line in code.replace("\\\n", " ").splitlines())
        else:
            continue
        if number + 1 < len(blocks) and blocks[number + 1][0] == "text":
            assert _trimmed(printed) == _trimmed(blocks[number + 1][1]), f"{place} printed:\n{printed}"
        count += 1
    return count


def _command(line: str, place: str) -> str:
    script, *words = shlex.split(line)
    assert script in ("afresh-curate", "afresh-train"), f"{place}: {line}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", script.removeprefix("afresh-"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, f"{place}: {done.stderr}"
    return done.stdout


def _trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
