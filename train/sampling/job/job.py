"""``train sample``: images for a file of prompts, their record, and pictures to look at.

Each image is drawn from its own seed, so it does not depend on what it was batched with. The PNG itself
carries its record (prompt, seed, guidance, nearest training sample, trace): a run that was stopped goes on
from the files that are there, and ``samples.parquet`` can be written from them alone. Several processes share the
images out and meet in the files too (:mod:`train.sampling.job.shares`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from afresh.errors import UsageError, UserError
from afresh.progress import get_logger
from train.prompts import read_prompts
from train.sampling.config import SampleConfig
from train.sampling.job import shares
from train.sampling.job.comparison import write_comparison
from train.sampling.job.folder import Folder
from train.sampling.job.settings import check_settings
from train.sampling.pipelines.session import Opened

log = get_logger(__name__)


def run_sample(config: SampleConfig) -> dict[str, Any]:
    """Draw what ``config`` asks for and is not there yet.

    Writes ``out/*.png``, ``out/samples.parquet`` (a row an image), ``out/trace.parquet`` (a row an image and
    step) and ``out/grid.png`` (rows = prompts, columns = seeds). With ``compare``, all of these into ``out/NAME`` for
    each guidance, and ``out/compare.png`` and ``out/compare.parquet`` (a row an image and guidance).

    Of several processes each draws its share; the first waits for the others and writes tables and pictures.

    Returns:
        What :func:`~train.sampling.job.records.summarise` counts, ``made``: images that this call drew or withheld, and
        ``out``. With ``compare`` instead ``guidances``, a list of one such summary a guidance, ``made``, ``picture``,
        ``table`` and ``out``. Of a run that ``launch.sh`` was asked to stop, ``made``, ``stopped`` and ``out``. Empty
        in all processes but the first.

    Raises:
        UsageError: options that do not go together.
        UserError: an input is missing or does not fit; ``out`` holds images of other settings; another process stopped
            writing.
    """
    compared = bool(config.compare)
    if compared and config.guidance != "none":
        raise UsageError("--compare names the guidances: leave --guidance out, or put it among them")
    if len(set(config.compare)) < len(config.compare):
        raise UsageError(f"--compare {','.join(config.compare)}: a guidance stands twice")
    configs = [config]
    if compared:
        names = [name or "none" for name in config.compare]
        configs = [replace(config, guidance=n, out=str(Path(config.out) / n), compare=[]) for n in names]
    for one in configs:
        check_settings(one)
    prompts = read_prompts(config.prompts)
    for prompt in prompts:
        if compared and prompt.image is not None and not prompt.image.is_file():
            raise UserError(f"{prompt.image}: the training image of {prompt.caption!r} is missing")
    opened = Opened(config, prompts)
    folders = [Folder.begin(one, prompts) for one in configs]
    for folder in folders:
        folder.draw(opened)
    rank, _ = shares.process()
    if rank:
        return {}
    for folder in folders:
        folder.collect()
    if any(folder.pending for folder in folders):
        log.info("stopped; the same command goes on from there")
        return {"made": sum(folder.made for folder in folders), "stopped": True, "out": config.out}
    for folder in folders:
        folder.write()
    summaries = [folder.summary() for folder in folders]
    if not compared:
        return summaries[0]
    return write_comparison(config, prompts, folders, summaries)


