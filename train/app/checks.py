"""What can be seen to be wrong with the settings and files of ``train app`` before torch or Gradio is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from afresh.errors import UsageError
from curate.index.training_index import check_index
from curate.reading.urls import expand_shards
from train.app.config import AppConfig
from train.denoising.opening.files import check_openable
from train.memorization.checks import check_scored_steps
from train.memorization.neurons.files import read_neurons
from train.prompts import read_prompts


def check_app(config: AppConfig) -> None:
    """Check ``train app``: that there is something to show, and that it is there.

    Raises:
        UserError: a setting is out of its range, a file is missing or malformed, or Gradio is not installed.
    """
    if not (config.model or config.curated or config.runs):
        raise UsageError("there is nothing to show: give --model, --curated or --runs")
    for option, least in (("seeds", 1), ("image_steps", 1), ("clean", 0), ("port", 0), ("max_upload_mb", 1)):
        if getattr(config, option) < least:
            raise UsageError(f"{option} is {getattr(config, option)}: expected at least {least}")
    check_scored_steps(config.steps, config.num_inference_steps, 1)
    if config.shards and not config.curated:
        raise UsageError("shards are those that were curated: give --curated too")
    if config.curated:
        check_index(config.curated)
        if "://" in config.curated and not config.review:
            raise UsageError("a curation at a URL has its lists elsewhere: give --review FOLDER")
    if config.shards:
        expand_shards(config.shards)
    if config.runs and not Path(config.runs).is_dir():
        raise UsageError(f"{config.runs}: there is no such folder of runs")
    if config.prompts:
        read_prompts(config.prompts)
    if config.neurons:
        read_neurons(config.neurons)
    if config.model:
        check_openable(config)
    if find_spec("gradio") is None:
        raise UsageError("the page needs Gradio: pip install 'afresh[app]'")
