"""``train sample``: images for a file of prompts, their record, and pictures to look at.

Each image is drawn from its own seed, so it does not depend on what it was batched with. The PNG itself
carries its record (prompt, seed, guidance, nearest training sample, trace): a run that was stopped goes on
from the files that are there, and ``samples.parquet`` can be written from them alone. Several processes share the
images out and meet in the files too (:mod:`train.sampling.job.shares`).
"""

from __future__ import annotations

from typing import Any

from afresh.progress import get_logger
from train.sampling.config import SampleConfig
from train.sampling.job import shares
from train.sampling.job.checks import check_sample, prompts_to_draw, settings_of_each
from train.sampling.job.comparison import write_comparison
from train.sampling.job.folder import Folder
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
    check_sample(config)
    configs, prompts = settings_of_each(config), prompts_to_draw(config)
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
    if not config.compare:
        return summaries[0]
    return write_comparison(config, prompts, folders, summaries)


