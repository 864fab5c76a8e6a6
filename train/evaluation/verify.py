"""``train evaluate --verify``: a random tenth of what was drawn is drawn again, and compared bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from afresh.errors import UserError
from afresh.files import write_json
from afresh.progress import get_logger
from train.prompts import Prompt, write_prompts
from train.sampling.config import SampleConfig
from train.sampling.job.job import run_sample
from train.sampling.job.records import SAMPLES

log = get_logger(__name__)
SHARE = 0.1


def verify(configs: Sequence[SampleConfig], out: Path, seed: int | None = None) -> dict[str, Any]:
    """Draw a random tenth of all batches again, at least one, into ``out``, and compare.

    Batches and not images: what is computed together may differ in its last bits from what is computed alone.

    Args:
        configs: what was drawn.
        out: folder for what is drawn now; what it holds is removed.
        seed: of the choice; None chooses anew each time.

    Returns:
        ``images`` drawn again, ``of`` how many, ``seed``, and ``different``, the files that differ; also in
        ``out/verify.json``.

    Raises:
        UserError: an image came out differently.
    """
    if out.exists():
        shutil.rmtree(out)
    batches = [(config, rows) for config in configs for rows in _batches(config)]
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    chosen = np.random.default_rng(seed).permutation(len(batches))[: max(1, round(SHARE * len(batches)))]
    different: list[str] = []
    images = 0
    for number in sorted(chosen.tolist()):
        config, rows = batches[number]
        again = out / f"{number:04d}"
        write_prompts(again / "prompts.jsonl", [Prompt(row["prompt"], row["label"], seed=row["seed"]) for row in rows])
        log.info(f"{config.out}: {len(rows)} images once more")
        run_sample(dataclasses.replace(config, prompts=str(again / "prompts.jsonl"), out=str(again), seeds=1))
        for before, now in zip(rows, _rows(again), strict=True):
            images += 1
            if not _same(Path(config.out) / before["file"], again / now["file"], before, now):
                different.append(str(Path(config.out) / before["file"]))
    found = {"images": images, "of": sum(len(rows) for _, rows in batches), "seed": seed, "different": different}
    write_json(out / "verify.json", found)
    if different:
        raise UserError(
            f"{len(different)} of {images} images came out differently when drawn again, such as {different[0]}: on "
            f"another processor or number of threads they may; see {out}"
        )
    return found


def _rows(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    return parquet.read_table(folder / "samples.parquet", columns=list(SAMPLES)).to_pylist()


def _batches(config: SampleConfig) -> list[list[dict[str, Any]]]:
    rows = _rows(Path(config.out))
    return [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]


def _same(before: Path, now: Path, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two images are equal bit for bit; withheld ones have none."""
    if old["withheld"] or new["withheld"]:
        return bool(old["withheld"]) == bool(new["withheld"])
    with Image.open(before) as one, Image.open(now) as other:
        return one.size == other.size and one.mode == other.mode and one.tobytes() == other.tobytes()
