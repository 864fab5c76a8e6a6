"""The tab *Set*: search, groups of copies, why one was dropped, and a person's own decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from afresh.errors import UsageError, UserError
from curate.reading.images import ImageError, decode_image
from train.app.fragments import fragment
from train.app.page.calls import SET, shown, told
from train.app.review import Review
from train.app.sets import CuratedSet

ACT = """element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  if (button) trigger('act', {row: Number(button.dataset.row), act: button.dataset.act});
});"""
LISTED = 100
Groups = list[list[int]]


@dataclass(frozen=True)
class SetTab:
    """What the tab works with."""

    curated: CuratedSet
    review: Review
    shards: Sequence[str]

    def build(self, demo: gr.Blocks) -> None:
        """Lay the tab out, within ``demo``."""
        summary = self.curated.summary
        seen = gr.State({"rows": [], "note": "", "query": None, "similarity": {}})
        gr.HTML(
            f"<p class='soft'>{summary['samples']:,} samples: {summary['kept']:,} kept, "
            f"{summary['dropped']:,} dropped, {summary['unreadable']:,} unreadable; "
            f"{len(self.curated.groups):,} groups of copies.</p>"
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=260):
                text = gr.Textbox(
                    label="Search captions",
                    placeholder="words, then Enter",
                    max_length=2000,
                    submit_btn="Search",
                    elem_id="search-text",
                )
                file = gr.File(
                    label="or drop an image",
                    file_types=[".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"],
                    type="filepath",
                    height=150,
                    elem_id="search-image",
                )
                with gr.Row():
                    page = gr.Number(
                        1, label=f"Groups: page, of {self.curated.pages:,}", precision=0, minimum=1,
                        maximum=self.curated.pages, min_width=120, elem_id="page"
                    )  # fmt: skip
                    browse = gr.Button("Show groups", min_width=110, elem_id="browse")
                why = gr.HTML(js_on_load=ACT, elem_id="why")
                review = gr.HTML(self.reviewed(), js_on_load=ACT, elem_id="review")
            with gr.Column(scale=7, min_width=320):
                listing = gr.HTML(js_on_load=ACT, elem_id="listing")
        found = {"outputs": [seen, listing], "show_progress": "hidden", **SET}
        text.submit(told(self.search), inputs=text, **found)
        file.upload(told(self.search_image), inputs=file, **found)
        browse.click(told(self.browse), inputs=page, **found)
        page.submit(told(self.browse), inputs=page, **found)
        demo.load(told(self.browse), inputs=page, **found)
        for source in (listing, why, review):
            source.act(
                told(self.act), inputs=seen, outputs=[seen, listing, why, review], show_progress="hidden", **SET
            )

    def search(self, text: str) -> tuple[dict[str, Any], str]:
        """Samples by caption."""
        return self._listed([self.curated.by_text(text)], f"Nearest by caption to “{text[:200]}”")

    def search_image(self, file: str | None) -> tuple[dict[str, Any], str]:
        """Samples by image."""
        if file is None:
            raise UsageError("there is no image to search for")
        try:
            found = self.curated.by_image(file)
        except UserError as error:  # where it lies on this machine is nobody's affair
            raise UserError(str(error).replace(file, Path(file).name)) from error
        try:
            query = shown(decode_image(Path(file).read_bytes(), max_pixels=self.curated.pictures.max_pixels), 160)
        except (OSError, ImageError):
            query = None
        return self._listed([found], "Nearest by image", query)

    def browse(self, page: float | None) -> tuple[dict[str, Any], str]:
        """A page of groups."""
        groups = self.curated.page(int(page or 1))
        note = "Groups of copies, the largest first" if groups else "This set has no copies."
        return self._listed(groups, note)

    def act(self, seen: dict[str, Any], event: gr.EventData) -> tuple[Any, Any, Any, Any]:
        """What a button of a sample does: tell why, show its group, or decide."""
        row, act = int(event._data["row"]), str(event._data["act"])
        found = self.curated.why(row)
        sample = found["sample"]
        if act == "group":
            return *self._listed([self.curated.group(sample["group"])], "All of one image"), gr.skip(), gr.skip()
        if act in ("keep", "exclude", "back"):
            self.review.decide((sample["shard"], sample["key"]), None if act == "back" else act)  # type: ignore[arg-type]
            return gr.skip(), self._again(seen), gr.skip(), self.reviewed()
        for name in ("sample", "instead"):
            if found[name] is not None:
                found[name] = self._with_image(found[name], 256)
        return gr.skip(), gr.skip(), fragment("why", **found), gr.skip()

    def reviewed(self) -> str:
        """The decisions, and the command that they are for."""
        rows = self.curated.pictures.rows
        listed = [(rows.get(one), f"{one[0]} / {one[1]}", decision) for one, decision in self.review.decided.items()]
        listed.reverse()  # the last decision first
        return fragment(
            "review",
            keep=self.review.listed("keep"),
            exclude=self.review.listed("exclude"),
            folder=str(self.review.folder),
            command=self.review.command(self.shards, self.curated.out),
            listed=listed[:LISTED],
            more=len(listed[LISTED:]),
        )

    def _listed(
        self, groups: list[list[dict[str, Any]]], note: str, query: str | None = None
    ) -> tuple[dict[str, Any], str]:
        similarity = {str(one["row"]): one["similarity"] for group in groups for one in group if "similarity" in one}
        rows = [[one["row"] for one in group] for group in groups]
        seen = {"rows": rows, "note": note, "query": query, "similarity": similarity}
        return seen, self._again(seen)

    def _again(self, seen: dict[str, Any]) -> str:
        groups = [self.curated.samples(rows) for rows in seen["rows"] if rows]
        for group in groups:
            for one in group:
                if str(one["row"]) in seen["similarity"]:
                    one["similarity"] = seen["similarity"][str(one["row"])]
        cards = [[self._with_image(one, 128) for one in group] for group in groups]
        return fragment("cards", groups=cards, note=seen["note"], query=seen["query"], titled=not seen["similarity"])

    def _with_image(self, sample: dict[str, Any], largest: int) -> dict[str, Any]:
        image = self.curated.pictures.image(sample["shard"], sample["key"])
        decided = self.review.decided.get((sample["shard"], sample["key"]))
        return sample | {"image": shown(image, largest), "decided": decided}
