"""The neurons behind a prompt, by layer, and an image without some of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from afresh.errors import UsageError
from train.app.bench import Bench
from train.app.prompts import checked, draw
from train.denoising.network import network_of
from train.memorization.neurons.files import read_neurons
from train.memorization.neurons.localization import Localizer
from train.memorization.neurons.value_neurons import Neurons, count, value_layers, widths
from train.sampling.config import SampleConfig

CLEAN = 64
"""Clean captions that tell what a neuron costs others."""


class PromptNeurons:
    """The neurons of prompts: from a file, or searched for.

    Args:
        bench: with the model.
        clean: captions that are not memorized; a search needs two at least.
        file: of ``train localize``; empty for none.
        seeds: noises of a search, two at least.
    """

    def __init__(self, bench: Bench, clean: Sequence[str], file: str = "", seeds: int = 4) -> None:
        self.bench, self.clean = bench, list(clean)[:CLEAN]
        self.seeds = max(seeds, 2)  # a search compares noises with each other
        self.known = read_neurons(file)[1] if file else {}
        self._localizer: Localizer | None = None
        self._making = threading.Lock()

    def sizes(self, client: str) -> dict[str, int]:
        """Value layers of the model, with how many neurons each has."""
        with self.bench.alone(client) as pipe:
            return widths(value_layers(network_of(pipe), up_blocks=True))

    def find(self, client: str, prompt: str, share: float) -> dict[str, list[int]]:
        """The neurons of a prompt: those of the file where it has the prompt, else as many as a share of the model's,
        by how much blocking each gains over what it costs clean captions.

        Args:
            client: who asks.
            prompt: the prompt.
            share: of the model's neurons, above 0, at most 1.

        Raises:
            UserError: there are no clean captions, the model has no cross-attention, or the client stopped it.
        """
        if prompt in self.known:
            return self.known[prompt]
        if len(self.clean) < 2:
            raise UsageError("a search for neurons needs clean captions: give --curated, or --prompts with label 0")
        if not 0 < share <= 1:
            raise UsageError(f"{share} is no share of the neurons: expected a number above 0, and at most 1")
        with self.bench.alone(client) as pipe:
            if self._localizer is None:
                self._localizer = Localizer(pipe, self.clean, criterion="selective", up_blocks=True)
            localizer = self._localizer
            localizer.number = max(1, round(share * sum(localizer.sizes.values())))
            # No threshold: the prompt was asked for, whatever its magnitude.
            return localizer.find(checked(prompt), list(range(self.seeds)), 0.0).neurons

    def draw(self, client: str, config: SampleConfig, prompt: str, seed: int, off: Neurons) -> dict[str, Any]:
        """An image without some neurons, as :func:`~train.app.prompts.draw` gives it."""
        return draw(self.bench, client, config, prompt, seed, off)


def strip(sizes: Mapping[str, int], found: Neurons, off: Neurons) -> dict[str, Any]:
    """The layers with their neurons, as they are shown.

    Args:
        sizes: neurons of each layer.
        found: those of the prompt.
        off: those of them that are blocked.

    Returns:
        ``layers``, each with ``name``, ``label``, ``size`` and ``neurons`` (``unit``, ``off``), and how many are
        ``on`` and ``off``; ``found``, ``blocked`` and ``all``, counts.
    """
    layers = []
    for name, size in sizes.items():
        gone = set(off.get(name, ()))
        units = [{"unit": unit, "off": unit in gone} for unit in found.get(name, ())]
        blocked_here = sum(one["off"] for one in units)
        layers.append(
            {
                "name": name,
                "label": label(name),
                "size": size,
                "neurons": units,
                "off": blocked_here,
                "on": len(units) - blocked_here,
            }
        )
    return {"layers": layers, "found": count(found), "blocked": count(off), "all": sum(sizes.values())}


def label(layer: str) -> str:
    """``down 1.0`` for ``down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v``."""
    parts = layer.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return f"{parts[0].partition('_')[0]} {'.'.join(numbers[:2] if parts[0] != 'mid_block' else numbers[:1])}"


def switched(found: Neurons, off: Neurons, layer: str, unit: int | None = None) -> dict[str, list[int]]:
    """What is blocked when a neuron is switched, or with None a whole layer: on if all of it is off, else off.

    Raises:
        UsageError: the prompt has no such neuron.
    """
    own = list(found.get(layer, ()))
    if not own or (unit is not None and unit not in own):
        raise UsageError("the prompt has no such neuron")
    before = set(off.get(layer, ()))
    after = before ^ {unit} if unit is not None else set() if before >= set(own) else set(own)
    return {name: sorted(units) for name, units in {**off, layer: sorted(after)}.items() if units}

