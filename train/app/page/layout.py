"""The page: its tabs, its look, and how it is served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from train.app.config import AppConfig
from train.app.page.neurons_tab import NeuronsTab
from train.app.page.prompt_tab import PromptTab
from train.app.page.runs_tab import RunsTab
from train.app.page.set_tab import SetTab

STYLE = Path(__file__).with_name("page.css")
WAITING = 64
"""Requests that wait at most; more are told to come again."""
STAYS = 3600
"""Seconds that an uploaded file stays."""
SYSTEM = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]


def build(
    prompt: PromptTab | None, curated: SetTab | None, neurons: NeuronsTab | None, runs: RunsTab | None
) -> gr.Blocks:
    """The page with the tabs that there is something for."""
    with gr.Blocks(title="Afresh", analytics_enabled=False, delete_cache=(STAYS, STAYS), fill_width=True) as demo:
        gr.HTML("<h1>Afresh</h1>", elem_id="title")
        with gr.Tabs():
            if prompt is not None:
                with gr.Tab("Prompt", id="prompt"):
                    prompt.build(demo)
            if curated is not None:
                with gr.Tab("Set", id="set"):
                    curated.build(demo)
            if neurons is not None:
                with gr.Tab("Neurons", id="neurons"):
                    neurons.build()
            if runs is not None:
                with gr.Tab("Runs", id="runs"):
                    runs.build(demo)
    return demo.queue(max_size=WAITING, api_open=False)


def serve(demo: gr.Blocks, config: AppConfig) -> str:
    """Serve the page, and return at once; its address.

    Never shared, no file of this machine below its addresses, nothing asked of another machine.
    """
    mono: Sequence[str] = ["ui-monospace", "monospace"]
    theme = gr.themes.Base(font=SYSTEM, font_mono=list(mono), primary_hue="slate", neutral_hue="slate")
    options: dict[str, Any] = {"server_port": config.port or None}
    _, address, _ = demo.launch(
        server_name=config.host,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        allowed_paths=[],
        max_file_size=config.max_upload_mb * 1_000_000,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        footer_links=[],
        theme=theme,
        css_paths=[STYLE],
        **options,
    )
    return address
