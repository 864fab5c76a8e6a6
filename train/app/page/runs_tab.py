"""The tab *Runs*: a folder of runs, looked at again and again while one of them goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from afresh.pages import line_chart, picture
from train.app.fragments import fragment
from train.app.page.calls import SET, told
from train.app.runs import Run, chosen, figures_of, find_runs, progress_of, tables_of

EVERY = 3.0
"""Seconds between two looks at a run that goes on."""


@dataclass(frozen=True)
class RunsTab:
    """What the tab works with."""

    folder: Path

    def build(self, demo: gr.Blocks) -> None:
        """Lay the tab out, within ``demo``."""
        names = [run.name for run in find_runs(self.folder)]
        with gr.Row(equal_height=False):
            name = gr.Dropdown(
                names, value=names[0] if names else None, label="Run", elem_id="run", scale=5
            )
            again = gr.Button("Look again", elem_id="look-again", scale=1, min_width=110)
        going = gr.HTML(elem_id="going")
        finished = gr.HTML(elem_id="finished")
        timer = gr.Timer(EVERY)
        whole = {"inputs": name, "outputs": [going, finished], "show_progress": "hidden", **SET}
        name.input(told(self.show), **whole)
        demo.load(told(self.show), **whole)
        again.click(told(self.names), inputs=name, outputs=name, queue=False).then(told(self.show), **whole)
        timer.tick(told(self.going), inputs=name, outputs=going, show_progress="hidden", **SET)

    def names(self, name: str | None) -> Any:
        """The runs that there are now."""
        names = [run.name for run in find_runs(self.folder)]
        return gr.update(choices=names, value=name if name in names else (names[0] if names else None))

    def show(self, name: str | None) -> tuple[str, str]:
        """All of a run."""
        if name is None:
            return "<p class='soft'>There is no run in this folder yet.</p>", ""
        run = chosen(self.folder, name)
        figures = [(file, picture(image, 1200)) for file, image in figures_of(run)]
        rest = fragment("run", progress=None, charts={}, tables=tables_of(run), figures=figures)
        return self._going(run), rest

    def going(self, name: str | None) -> Any:
        """What changes while a run goes on."""
        return gr.skip() if name is None else self._going(chosen(self.folder, name))

    def _going(self, run: Run) -> str:
        progress = progress_of(run)
        if progress is None:
            return ""
        charts = {
            one: line_chart(progress[one], words) if progress[one] else ""
            for one, words in (("loss", "loss"), ("dropped", "share left out"), ("magnitude", "mean magnitude"))
        }
        return fragment("run", progress=progress, charts=charts, tables=[], figures=[])
