"""How long a newcomer waits: from a folder of photographs to a report, a fine-tuned model and a page over both.

Makes a folder of photographs (those of scikit-image and scikit-learn, as random crops in other colours; every sixth
once more at half its size and once as a small JPEG), with captions beside them and without, and runs the four commands
of docs/guides/own-folder.md on each, on the carried sample model. Prints a table of wall-clock seconds.

    python -m benchmarks.newcomer --out runs/newcomer --photographs 60 --steps 90
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.photographs import grain, library_photographs, photograph
from train.denoising.opening.loading import sample_model_dir


def write_folder(folder: Path, count: int, *, captions: bool) -> int:
    """Write ``count`` photographs and the copies of every sixth; how many files with images there are then."""
    sources = library_photographs()
    if not sources:
        raise SystemExit("no photographs: pip install scikit-image scikit-learn")
    rng = np.random.default_rng(0)
    noise = grain(1024, rng, ((1, 4.0), (4, 3.0))).astype(np.int16)
    (folder / "sent").mkdir(parents=True)
    for number in range(count):
        image = photograph(sources, noise, rng)
        image.save(folder / f"IMG_{number:04d}.jpg", quality=92)
        if number % 6 == 0:
            image.resize((image.width // 2, image.height // 2)).save(folder / f"IMG_{number:04d} (1).jpg", quality=70)
            image.save(folder / "sent" / f"IMG_{number:04d}.jpeg", quality=40)
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".jpeg"))
    for path in files if captions else []:
        path.with_suffix(".txt").write_text(f"a photograph, number {path.stem[4:8]}\n", encoding="utf-8")
    return len(files)


def main() -> None:
    """Run the commands and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--photographs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=90)
    args = parser.parse_args()
    print("| captions | command | seconds | what came of it |\n|---|---|---|---|")
    for captions in (True, False):
        place = args.out / ("with" if captions else "without")
        count = write_folder(place / "photos", args.photographs, captions=captions)
        for package, *words in (
            ("curate", "import", "photos", "data"),
            ("curate", "dedup", "data", "curated"),
            ("train", "finetune", "--model", str(sample_model_dir()), "--shards", "curated/shards", "--out", "run",
             "--steps", str(args.steps)),
            ("train", "reports", "."),
        ):  # fmt: skip
            started = time.monotonic()
            command = [sys.executable, "-P", "-m", package, *words, "--json"]
            done = subprocess.run(command, cwd=place, stdout=subprocess.PIPE, text=True, check=True)
            seconds, found = time.monotonic() - started, json.loads(done.stdout)
            shown = {name: found[name] for name in ("imported", "kept", "dropped", "steps", "pages") if name in found}
            of = f"{count} images: " if words[0] == "import" else ""
            told = of + ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"| {'beside' if captions else 'none'} | `{words[0]}` | {seconds:.1f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
