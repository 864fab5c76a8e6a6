"""``train app``: open what was named, serve the page, and stay until it is interrupted."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afresh.errors import UserError, one_line
from afresh.progress import get_logger
from train.app.config import AppConfig

if TYPE_CHECKING:
    import gradio

    from train.app.prompts import Reader

log = get_logger(__name__)


def run_app(config: AppConfig) -> dict[str, Any]:
    """Serve the page until SIGINT or SIGTERM.

    Returns:
        The ``address`` that it had.

    Raises:
        UserError: an input cannot be used, or the address is taken.
    """
    # Before Gradio is imported: it would ask another machine for its newest version, and for how it is used.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from train.app.page.layout import serve

    demo, reader = page(config)
    try:
        address = serve(demo, config)
    except OSError as error:
        raise UserError(f"{config.host}:{config.port}: the page cannot be served there: {one_line(error)}") from error
    log.info("the page is at %s", address)
    if reader is not None:
        threading.Thread(target=_prepare, args=(reader,), daemon=True).start()
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        log.info("closing the page")
    finally:
        demo.close(verbose=False)
    return {"address": address}


def page(config: AppConfig) -> tuple[gradio.Blocks, Reader | None]:
    """The page over what the settings name, not yet served, and what reads prompts, if there is a model.

    Raises:
        UserError: an input cannot be used.
    """
    from curate.index.training_index import TrainingIndex
    from train.app.page.layout import build
    from train.app.page.runs_tab import RunsTab
    from train.app.page.set_tab import SetTab
    from train.app.pictures import Pictures
    from train.app.review import Review
    from train.app.sets import CuratedSet

    pictures = curated = prompt = neurons = reader = None
    if config.curated:
        pictures = Pictures(config.curated, config.shards)
        folder = Path(config.review or f"{config.curated.rstrip('/')}.review")
        curated = SetTab(CuratedSet(config.curated, pictures), Review(folder), config.shards)
    if config.model:
        from train.app.bench import Bench
        from train.app.neurons import PromptNeurons
        from train.app.page.neurons_tab import NeuronsTab
        from train.app.page.prompt_tab import PromptTab
        from train.app.prompts import Reader, clean_and_examples

        bench = Bench(config)
        index = TrainingIndex.load(config.curated) if config.curated else None
        scale, examples = clean_and_examples(config, index)
        reader = Reader(bench, config, scale)
        prompt = PromptTab(reader, examples, pictures)
        neurons = NeuronsTab(PromptNeurons(bench, scale.captions, config.neurons, config.seeds), examples, pictures)
    runs = RunsTab(Path(config.runs)) if config.runs else None
    return build(prompt, curated, neurons, runs), reader


def _prepare(reader: Reader) -> None:
    """Open the model before it is asked for, and make the scale behind what is asked."""
    try:
        reader.score_clean()
    except UserError as error:  # whoever asks is told it too
        log.error("%s", one_line(error))
