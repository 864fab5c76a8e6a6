"""The tab *Neurons*: those of a prompt, layer by layer, to be switched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from train.app.fragments import fragment
from train.app.neurons import PromptNeurons, strip, switched
from train.app.page.calls import MODEL, client, told
from train.app.page.prompt_tab import blank, side
from train.app.pictures import Pictures
from train.app.prompts import LONGEST, checked

SWITCH = """element.addEventListener('click', event => {
  const button = event.target.closest('[data-layer]');
  if (!button) return;
  const unit = button.dataset.unit;
  trigger('switch', {layer: button.dataset.layer, unit: unit === undefined ? null : Number(unit)});
});
element.addEventListener('keydown', event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  const unit = event.target.closest('.unit');
  if (!step || !unit) return;
  const other = step > 0 ? unit.nextElementSibling : unit.previousElementSibling;
  if (other) { other.tabIndex = 0; other.focus(); unit.tabIndex = -1; event.preventDefault(); }
});"""
NOTE = "Find the neurons of a prompt first: they are blocked at once, and can be switched one by one."


@dataclass(frozen=True)
class NeuronsTab:
    """What the tab works with."""

    neurons: PromptNeurons
    examples: list[str]
    pictures: Pictures | None

    def build(self) -> None:
        """Lay the tab out."""
        state = gr.State({"prompt": "", "sizes": {}, "found": {}, "off": {}, "plain": None})
        known = list(self.neurons.known)
        examples = (known or self.examples)[:50]
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                prompt = gr.Textbox(
                    examples[0] if examples else "", label="Prompt", max_length=LONGEST, elem_id="neurons-prompt"
                )
                if examples:
                    label = "Prompts of the file" if known else "Try one that is repeated"
                    example = gr.Dropdown(examples, value=None, label=label, elem_id="neurons-example")
                    example.input(
                        lambda chosen: gr.skip() if chosen is None else chosen, example, prompt, queue=False
                    )
                with gr.Row():
                    share = gr.Slider(0.01, 0.5, 0.2, step=0.01, label="Share of the neurons", min_width=180)
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=90)
                with gr.Row():
                    find = gr.Button("Find and block them", variant="primary", elem_id="find", min_width=160)
                    stop = gr.Button("Stop", elem_id="neurons-stop", min_width=80)
                layers = gr.HTML(fragment("neurons", found=0, note=NOTE), js_on_load=SWITCH, elem_id="layers")
            with gr.Column(scale=5, min_width=320):
                pair = gr.HTML(fragment("pair", sides=_blanks("", "")), elem_id="neurons-pair")
        outputs = {"outputs": [state, layers, pair], "show_progress": "hidden", **MODEL}
        finding = find.click(told(self.find), inputs=[state, prompt, share, seed], **outputs)
        drawing = layers.switch(told(self.switch), inputs=state, outputs=[state, layers], queue=False).then(
            told(self.draw), inputs=[state, seed], trigger_mode="always_last", **outputs
        )
        stop.click(told(self.stop), cancels=[finding, drawing], queue=False, api_visibility="private")

    def find(
        self, state: dict[str, Any], prompt: str, share: float, seed: float, request: gr.Request
    ) -> Iterator[tuple[dict[str, Any], str, str]]:
        """Find a prompt's neurons, block all of them, and draw."""
        who, prompt = client(request), checked(prompt).strip()
        yield state, fragment("neurons", found=0, note="searching …"), fragment("pair", sides=_blanks("", ""))
        sizes = self.neurons.sizes(who)
        found = self.neurons.find(who, prompt, share)
        state = {"prompt": prompt, "sizes": sizes, "found": found, "off": found, "plain": None}
        yield from self.draw(state, seed, request)

    def switch(self, state: dict[str, Any], event: gr.EventData) -> tuple[dict[str, Any], str]:
        """Switch a neuron or a layer; the image follows."""
        unit = event._data["unit"]
        off = switched(state["found"], state["off"], str(event._data["layer"]), None if unit is None else int(unit))
        state = state | {"off": off}
        return state, self._strip(state)

    def draw(
        self, state: dict[str, Any], seed: float, request: gr.Request
    ) -> Iterator[tuple[dict[str, Any], str, str]]:
        """The image as it is, which is kept while prompt and seed stay, and without what is blocked."""
        if not state["prompt"]:
            return
        who, config = client(request), replace(self.neurons.bench.sampling, guidance="none")
        known = state["plain"]
        if known is None or known["seed"] != int(seed or 0):
            yield state, self._strip(state), fragment("pair", sides=_blanks("drawing …", "drawing …"))
            plain = self.neurons.draw(who, config, state["prompt"], int(seed or 0), {})
            known = side(plain, "All neurons", self.pictures) | {"seed": int(seed or 0)}
            state = state | {"plain": known}
        yield state, self._strip(state), fragment("pair", sides=[known, _blanks("", "drawing …")[1]])
        without = self.neurons.draw(who, config, state["prompt"], int(seed or 0), state["off"])
        title = f"{strip(state['sizes'], state['found'], state['off'])['blocked']} blocked"
        yield state, self._strip(state), fragment("pair", sides=[known, side(without, title, self.pictures)])

    def stop(self, request: gr.Request) -> None:
        """Stop what this client has asked for."""
        if not self.neurons.bench.stop(client(request)):
            gr.Info("Nothing is running.", duration=2)

    def _strip(self, state: dict[str, Any]) -> str:
        return fragment("neurons", note=NOTE, **strip(state["sizes"], state["found"], state["off"]))


def _blanks(plain: str, without: str) -> list[dict[str, Any]]:
    return [blank("All neurons", plain), blank("Blocked", without)]
