"""What a comparison starts from: prompts and originals, and everything that is missing, before anything is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afresh.errors import UserError, one_line
from afresh.progress import get_logger
from train.evaluation.config import Protocol
from train.evaluation.judging.originals import read_image, read_originals
from train.evaluation.presets.published import Listed, read_list, write_missing
from train.memorization.neurons.files import read_neurons
from train.prompts import Prompt, read_prompts, write_prompts

if TYPE_CHECKING:
    from PIL.Image import Image


FILES = ("sscd", "inception", "dual-encoder")
"""Metrics whose weights have no name on a hub."""
HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
DEAD_LINKS = "dead_links.tsv"
log = get_logger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Prompts by kind, and their originals."""

    files: dict[str, str]
    """Prompt files as ``train sample`` takes them."""
    prompts: dict[str, list[Prompt]]
    originals: dict[str, list[Image]] = field(default_factory=dict)
    """By caption."""


def refuse_missing(protocol: Protocol) -> None:
    """Raise UserError, in one line, with everything that a protocol names and that is not there."""
    from curate.index.training_index import index_folder
    from curate.reading.urls import expand_shards

    missing: list[str] = []

    def look(what: str, look_for: Callable[..., object], *where: Any, **how: Any) -> None:
        try:
            look_for(*where, **how)
        except (UserError, OSError) as error:
            missing.append(f"{what}: {one_line(error)}")

    for name, model in protocol.models.items():
        look(f"model {name}", _look_for_model, model)
    for name, lora in protocol.loras.items():
        look(f"adapters of {name}", _look_for, lora, hub=True)
    for name, neurons in protocol.neurons.items():
        look(f"neurons of {name}", read_neurons, neurons)
    for kind, file in protocol.prompts.items():
        look(f"prompts {kind}", _look_for, file)
    if protocol.originals:
        look("originals", _look_for, protocol.originals)
    if protocol.index:
        look("index", index_folder, protocol.index)
    for what, shards in (("training", protocol.training), ("held_out", protocol.held_out)):
        if shards:
            look(what, expand_shards, shards)
    for name, at in protocol.weights.items():
        look(f"weights of {name}", _look_for, _file(at), hub=name not in FILES)
    if missing:
        raise UserError(f"not everything is there, and nothing was drawn: {'; '.join(missing)}")


def ready_inputs(protocol: Protocol, out: Path) -> Inputs:
    """Read the prompts and their originals.

    Prompts of a published list none of whose originals is there are left out: no judge could see their copies. They are
    named, and all originals that are missing stand in ``out/dead_links.tsv`` with their URLs.

    Raises:
        UserError: a file cannot be read, or nothing is left of it.
    """
    if protocol.originals:
        listed = {kind: read_list(file, protocol.originals) for kind, file in protocol.prompts.items()}
        return _of_lists(listed, protocol.originals, out)
    files, prompts = dict(protocol.prompts), {}
    for kind, file in protocol.prompts.items():
        prompts[kind] = read_prompts(file)
        if kind in protocol.labels:
            prompts[kind] = [prompt for prompt in prompts[kind] if prompt.label == protocol.labels[kind]]
            if not prompts[kind]:
                raise UserError(f"{file}: holds no prompt of label {protocol.labels[kind]}, which are {kind}")
            files[kind] = _written(out, kind, prompts[kind])
    originals = read_originals([prompt for some in prompts.values() for prompt in some])
    return Inputs(files, prompts, {caption: [image] for caption, image in originals.items()})


def _of_lists(lists: dict[str, list[Listed]], folder: str, out: Path) -> Inputs:
    everything = [one for listed in lists.values() for one in listed]
    lost = write_missing(out / DEAD_LINKS, everything)
    if lost:
        dead = [one for one in everything if not one.originals]
        first = next(one for one in everything if one.missing)
        name, url = first.missing[0]
        log.warning(
            f"{lost} originals are not in {folder}, such as {name} of {first.caption!r} ({url or 'no URL'}): all in "
            f"{out / DEAD_LINKS}; {len(dead)} of {len(everything)} prompts have none and are left out"
        )
    files, prompts, originals = {}, {}, {}
    for kind, listed in lists.items():
        found = [one for one in listed if one.originals]
        if not found:
            raise UserError(f"{folder}: holds no original of the {len(listed)} prompts {kind}: see {out / DEAD_LINKS}")
        prompts[kind] = [Prompt(one.caption, 1, one.originals[0]) for one in found]
        files[kind] = _written(out, kind, prompts[kind])
        for one in found:
            originals[one.caption] = [read_image(path, one.caption) for path in one.originals]
    return Inputs(files, prompts, originals)


def _written(out: Path, kind: str, prompts: list[Prompt]) -> str:
    path = out / "samples" / f"{kind}.jsonl"
    write_prompts(path, prompts)
    return str(path)


def _look_for(path: str, *, hub: bool = False) -> None:
    if not Path(path).exists() and not (hub and HUB_NAME.fullmatch(path)):
        raise UserError(f"{path} is not there")


def _file(weights: str) -> str:
    """Of an embedder's file without the ``@SIZE`` that may follow its name."""
    return weights if Path(weights).exists() else weights.rpartition("@")[0] or weights


def _look_for_model(model: str) -> None:
    """A folder or file, or a name whose pipeline the hub, or what was fetched from it, knows."""
    if Path(model).exists():
        return
    from diffusers import DiffusionPipeline

    if not HUB_NAME.fullmatch(model):
        raise UserError(f"{model} is not there")
    try:
        DiffusionPipeline.load_config(model)
    except Exception:
        raise UserError(f"{model} is no folder here, and no model of this name could be had from the hub") from None
