"""Runs the commands of a guide, in order and offline, in a folder that has what the guide says that its reader has."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.documents import ROOT

_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "not run"

SMALL = {  # what a test adds to each command, behind what the guide has
    "curate dedup": "--workers 1",
    "train finetune": "--steps 2 --epochs 0 --batch_size 2 --warmup_steps 0 --workers 0 --gradient_checkpointing false",
    "train sample": "--steps 3 --batch_size 8",
    "train detect": "--steps 2 --num_inference_steps 3 --bootstrap 10",
    "train explain": "--steps 1 --num_inference_steps 2 --words 1 --replacements 1",
    "train localize": "--criterion magnitude --number 4 --seeds 2 --clean_captions 2 --report false",
    "train audit": "--images 1 --search_steps 2 --measure_every 1 --steps 2 --seeds 1 --bootstrap 10",
    "train quickstart": "--mess.images 3 --mess.copies 6 --finetune.steps 2 --finetune.batch_size 8 "
    "--held_out_captions 4 --seeds 1 --steps 2 --detect_held_out 8 --detect_seeds 1 --detect_steps 1 --outcome_steps 2 "
    "--localize.criterion magnitude --localize.number 10 --localize.clean_captions 4 --columns 3",
}


@dataclass
class Block:
    """A fenced block of a guide."""

    language: str
    title: str
    code: str
    before: str
    """The text between the block before it and this one."""

    @property
    def skipped(self) -> bool:
        """Whether the guide says that this is not run."""
        return NOT_RUN in self.title


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text, end, found = page.read_text(encoding="utf-8"), 0, []
    for match in _BLOCK.finditer(text):
        found.append(Block(match[1], match[2] or "", match[3], text[end : match.start()]))
        end = match.end()
    return found


def prepare(folder: Path) -> dict[str, str]:
    """Lay out what readers have (photographs with captions and without, a model) and give the environment."""
    from curate.reading.images import decode_image
    from curate.sample_set import load_part

    samples = load_part("finetune")[:12]
    for name, captions in (("photos", True), ("snapshots", False)):
        (folder / name / "trip").mkdir(parents=True)
        for number, sample in enumerate(samples):
            for place in ("", "trip/")[: 2 if number % 4 == 0 else 1]:
                decode_image(sample.image).save(folder / name / f"{place}{number:02d}.png")
                if captions:
                    (folder / name / f"{place}{number:02d}.txt").write_bytes(sample.members["txt"])
    tools = folder / ".tools"
    tools.mkdir()
    run = (sys.executable, "-m", "tests.guides")
    for script, words in (
        (tools / "afresh-curate", (*run, "curate")),
        (tools / "afresh-train", (*run, "train")),
        (tools / "python", run[:1]),
        (folder / "launch.sh", (*run, "launch")),
    ):
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        script.chmod(0o755)
    (folder / "configs").symlink_to(ROOT / "configs")
    return {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MODEL": str(ROOT / "train" / "assets" / "sample_model"),
    }


def run_guide(page: Path, folder: Path) -> int:
    """Run the ``bash`` and ``python`` blocks of a guide; how many there were.

    What a block exports, and the folder that it changes to, hold in the next ones. Python blocks share a namespace, see
    the working folder that bash left, and print what a block ``text`` behind them says.
    """
    env, place, count = prepare(folder), folder, 0
    namespace: dict[str, Any] = {"__name__": "guide"}
    found = blocks_of(page)
    for number, block in enumerate(found):
        if block.skipped or block.language not in ("bash", "python"):
            continue
        at = f"{page.name}, block {number}"
        if block.language == "bash":
            state = folder / ".state"
            script = f"set -euo pipefail\n{block.code}\nenv -0 > {shlex.quote(str(state))}\n"
            done = subprocess.run(
                ["bash", "-c", script], cwd=place, env=env, capture_output=True, text=True, timeout=840
            )
            assert done.returncode == 0, f"{at}:\n{done.stdout}\n{done.stderr}"
            env = dict(line.split("=", 1) for line in state.read_text().split("\0") if line)
            place, printed = Path(env["PWD"]), done.stdout
        else:
            with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.chdir(place):
                exec(compile(block.code, at, "exec"), namespace)
            printed = stdout.getvalue()
        if number + 1 < len(found) and found[number + 1].language == "text":
            assert printed.strip() == found[number + 1].code.strip(), f"{at} printed:\n{printed}"
        count += 1
    return count


def launch(words: list[str]) -> int:
    """``launch.sh`` as far as it goes without GPUs: its dry run beside eight stand-ins, and the check of the config."""
    stand_in = Path(".tools") / "eight"
    (stand_in / "bin").mkdir(parents=True, exist_ok=True)
    (stand_in / "bin" / "python").write_text("#!/bin/sh\necho 8\n")
    (stand_in / "bin" / "python").chmod(0o755)
    env = {**os.environ, "VIRTUAL_ENV": str(stand_in.resolve())}
    command = [str(ROOT / "launch.sh"), *words, "--dry-run"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    print(done.stdout, end="")
    said = shlex.split(done.stdout)
    package, *rest = said[said.index("-m", said.index("--multi_gpu") if "--multi_gpu" in said else 0) + 1 :]
    checked = [sys.executable, "-m", package, *rest, "--check_config"]
    return subprocess.run(checked, stdout=subprocess.DEVNULL).returncode


def main(words: list[str]) -> int:
    """Become a command of a guide at a small size."""
    if words[0] == "launch":
        return launch(words[1:])
    package, verb, *rest = words
    small = shlex.split(SMALL.get(f"{package} {verb}", ""))
    os.execv(sys.executable, [sys.executable, "-m", package, verb, *rest, *small])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
