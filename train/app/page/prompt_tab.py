"""The tab *Prompt*: magnitude and words, live; two images of one seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from train.app import prompts
from train.app.fragments import Curve, chart, fragment
from train.app.page.calls import MODEL, client, shown, told
from train.app.pictures import Pictures
from train.app.prompts import Reader
from train.app.strength import LEAST, MOST, STEP

STRIKE = """element.addEventListener('click', event => {
  const word = event.target.closest('[data-word]');
  if (word) trigger('strike', {word: Number(word.dataset.word)});
});"""


@dataclass(frozen=True)
class PromptTab:
    """What the tab works with."""

    reader: Reader
    examples: list[str]
    pictures: Pictures | None

    def build(self, demo: gr.Blocks) -> None:
        """Lay the tab out, within ``demo``."""
        first = self.examples[0] if self.examples else ""
        struck = gr.State([])
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                prompt = gr.Textbox(
                    first, label="Prompt", lines=2, max_lines=6, max_length=prompts.LONGEST, elem_id="prompt"
                )
                if self.examples:
                    example = gr.Dropdown(
                        self.examples, value=None, label="Try one that is repeated", filterable=True, elem_id="example"
                    )
                words = gr.HTML(fragment("words", words=_unread(first)), js_on_load=STRIKE, elem_id="words")
                magnitude = gr.HTML(elem_id="magnitude")
            with gr.Column(scale=6, min_width=320):
                asked = self._draw_controls(prompt, struck)
        update = {"outputs": [words, magnitude], "show_progress": "hidden", "trigger_mode": "always_last", **MODEL}
        read = told(self.read)
        # Not `input`, which misses what is pasted or taken away.
        prompt.change(list, outputs=struck, queue=False, show_progress="hidden", api_visibility="private")
        prompt.change(read, inputs=prompt, **update)
        words.strike(told(self.strike), inputs=[prompt, struck], outputs=[struck, words], queue=False).then(
            told(self.read_rest), inputs=[prompt, struck], **update
        )
        demo.load(read, inputs=prompt, **update)
        if self.examples:
            example.input(_chosen, inputs=example, outputs=prompt, queue=False, api_visibility="private")
        prompt.submit(**asked)

    def _draw_controls(self, prompt: gr.Textbox, struck: gr.State) -> dict[str, Any]:
        """The right half; what to do when images are asked for."""
        indexed = bool(self.reader.bench.sampling.index)
        names = prompts.choices(indexed)
        with gr.Row():
            guidance = gr.Dropdown(
                names,
                value=["amg-early" if indexed else "prompt"],
                multiselect=True,
                max_choices=3,
                label="Guidance",
                scale=3,
                min_width=160,
                elem_id="guidance",
            )
            strength = gr.Slider(
                LEAST, MOST, 1.0, step=STEP, label="Strength", scale=3, min_width=160, elem_id="strength"
            )
        with gr.Row():
            sampling = self.reader.bench.sampling
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=90)
            steps = gr.Number(sampling.steps, label="Steps", precision=0, minimum=1, maximum=200, min_width=90)
            scale = gr.Number(sampling.scale, label="Scale", minimum=0, maximum=50, min_width=90)
        with gr.Row():
            go = gr.Button("Draw both", variant="primary", elem_id="draw", min_width=120)
            stop = gr.Button("Stop", elem_id="stop", min_width=80)
        pair = gr.HTML(fragment("pair", sides=_sides(None, None, "", "")), elem_id="pair")
        trace = gr.HTML(elem_id="trace")
        asked: dict[str, Any] = {
            "fn": told(self.draw),
            "inputs": [prompt, struck, guidance, strength, seed, steps, scale],
            "outputs": [pair, trace],
            "show_progress": "hidden",
            **MODEL,
        }
        drawn = go.click(**asked)
        strength.release(**asked)
        stop.click(told(self.stop), cancels=[drawn], queue=False, api_visibility="private")
        return asked

    def read(self, prompt: str, request: gr.Request) -> tuple[str, str]:
        """Words and magnitude of a prompt as it stands."""
        return self.read_rest(prompt, [], request)

    def read_rest(self, prompt: str, struck: list[int], request: gr.Request) -> tuple[str, str]:
        """Words and magnitude of a prompt without what was struck."""
        if not prompt.strip():
            return fragment("words", words=[]), ""
        found = self.reader.read(client(request), prompt, struck)
        return fragment("words", struck=bool(struck), **found), fragment("magnitude", **found)

    def strike(self, prompt: str, struck: list[int], event: gr.EventData) -> tuple[list[int], str]:
        """Strike a word, or take it back; shown at once, before it is read."""
        number = int(event._data["word"])
        struck = sorted(set(struck) ^ {number})
        return struck, fragment("words", words=_unread(prompt, struck))

    def draw(
        self,
        prompt: str,
        struck: list[int],
        guidance: list[str],
        strength: float,
        seed: float,
        steps: float,
        scale: float,
        request: gr.Request,
    ) -> Iterator[tuple[str, str]]:
        """The plain image, then the mitigated one, then their trace."""
        bench, who = self.reader.bench, client(request)
        text = prompts.asked(prompts.checked(prompt), struck)
        plain, guided = prompts.settings(bench.sampling, guidance or [], strength, int(steps or 0), float(scale or 0))
        title = " + ".join(guidance or ["nothing"]) + (f", strength {strength:g}" if strength != 1 else "")
        yield fragment("pair", sides=_sides(None, None, title, "drawing …")), ""
        first = prompts.draw(bench, who, plain, text, int(seed or 0))
        one = self._side(first, "Plain")
        yield fragment("pair", sides=_sides(one, None, title, "drawing …")), ""
        second = prompts.draw(bench, who, guided, text, int(seed or 0))
        limit = prompts.limits(guided, second["trace"]) if bench.sampling.index else []
        yield (
            fragment("pair", sides=_sides(one, self._side(second, title), title, "")),
            trace_chart(first["trace"], second["trace"], limit, title),
        )

    def stop(self, request: gr.Request) -> None:
        """Stop what this client has asked for."""
        if not self.reader.bench.stop(client(request)):
            gr.Info("Nothing is running.", duration=2)

    def _side(self, record: dict[str, Any], title: str) -> dict[str, Any]:
        return side(record, title, self.pictures)


def side(record: dict[str, Any], title: str, pictures: Pictures | None) -> dict[str, Any]:
    """An image with its nearest training image, as the template of the pair takes it."""
    training = None
    if pictures is not None and record["nearest_key"] is not None:
        training = shown(pictures.image(record["nearest_shard"], record["nearest_key"]), 96)
    return {
        "title": title,
        "image": shown(record["image"], 384),
        "alt": f"{title}: {record['prompt']}",
        "copied": record["copied"],
        "withheld": record["withheld"],
        "similarity": record["similarity"],
        "training": training,
        "caption": record["nearest_caption"],
        "sample": f"{record['nearest_shard']} / {record['nearest_key']}",
        "without": "Give --curated to see the nearest training image.",
        "waiting": "",
    }


def _sides(plain: dict[str, Any] | None, guided: dict[str, Any] | None, title: str, waiting: str) -> list[Any]:
    names = ("Plain", title or "Mitigated")
    return [blank(name, waiting) if one is None else one for name, one in zip(names, (plain, guided), strict=True)]


def blank(title: str, waiting: str) -> dict[str, Any]:
    """The place of an image that is not there yet."""
    return {"title": title, "image": None, "copied": False, "withheld": False, "similarity": None, "waiting": waiting}


def trace_chart(
    plain: list[dict[str, Any]], guided: list[dict[str, Any]], limit: list[tuple[float, float]], title: str
) -> str:
    """The similarity of both images step by step beside λ_t; without an index their magnitudes."""
    watched = any(row.get("similarity") is not None for row in plain)
    name = "similarity" if watched else "magnitude"
    curves = [
        Curve(f"{name}, plain", [(row["t"], row.get(name)) for row in plain], "plain"),
        Curve(f"{name}, {title}", [(row["t"], row.get(name)) for row in guided], "guided"),
    ]
    if watched:
        curves.append(Curve("λ_t", limit, "limit"))
    return chart(curves, "timestep t", falling=True)


def _chosen(example: str | None) -> Any:
    return gr.skip() if example is None else example


def _unread(prompt: str, struck: list[int] | None = None) -> list[dict[str, Any]]:
    """The words before anything is known of them."""
    return [
        {
            "number": number,
            "text": word.text,
            "point": word.punctuation,
            "struck": number in (struck or []),
            "seen": True,
            "significance": None,
            "weight": 0.0,
        }
        for number, word in enumerate(prompts.words_of(prompt[: prompts.LONGEST]))
    ]
