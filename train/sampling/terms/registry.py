"""Guidance by name, for ``train sample``: names joined by ``+`` act in that order, as in ``tokens+amg``.

A term of one's own is ``module:Class``, or the name of an entry point of the group ``afresh.guidance``; it is made
without arguments, so its settings are its own defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afresh import plugins
from afresh.errors import UsageError
from train.memorization.thresholds import FILE, Thresholds, model_thresholds
from train.sampling.config import AMGConfig, SampleConfig, configured
from train.sampling.guidance import Guidance
from train.sampling.similarity import View
from train.sampling.terms.amg import AMG
from train.sampling.terms.anisotropy import AnisotropyMinimisation
from train.sampling.terms.attention_masking import AttentionMasking
from train.sampling.terms.basin import AttractionBasin
from train.sampling.terms.initial_noise import NoiseAdjustment
from train.sampling.terms.prompt_embedding import PromptMinimisation
from train.sampling.terms.random_tokens import RandomTokens
from train.sampling.terms.rejection import Rejection

if TYPE_CHECKING:
    from curate.embed.protocol import Embedder
    from curate.index.training_index import TrainingIndex


# What a name stands for: settings out of the job's, and what is made of them.
SETTINGS: dict[str, Callable[[SampleConfig], Any]] = {
    "amg": lambda c: c.amg,
    "amg-released": lambda c: replace(c.amg, preset="main"),
    "amg-paper": lambda c: replace(c.amg, preset="main", sim_form="paper", schedule="parabolic"),
    "amg-strong": lambda c: replace(c.amg, preset="strong"),
    "amg-early": lambda c: replace(c.amg, preset="early"),
    "prompt": lambda c: c.prompt,
    "anisotropy": lambda c: c.anisotropy,
    "attention": lambda c: c.attention,
    "basin": lambda c: c.basin,
    "opposite": lambda c: replace(c.basin, before=-c.scale),
    "noise": lambda c: c.noise,
    "noise-batch": lambda c: replace(c.noise, method="batch"),
    "tokens": lambda c: c.tokens,
    "numbers": lambda c: replace(c.tokens, kind="number"),
    "rejection": lambda c: c.rejection,
}
TERMS: dict[str, Callable[[Any], Guidance]] = {
    "prompt": PromptMinimisation,
    "anisotropy": AnisotropyMinimisation,
    "attention": AttentionMasking,
    "basin": AttractionBasin,
    "opposite": AttractionBasin,
    "noise": NoiseAdjustment,
    "noise-batch": NoiseAdjustment,
    "tokens": RandomTokens,
    "numbers": RandomTokens,
}


@dataclass(frozen=True)
class Own:
    """The settings of a term of one's own: what changes when its code does."""

    code: str


# Terms that change the prompt's words, and terms that work on whatever words there are.
WORDS, EMBEDDINGS = ("tokens", "numbers"), ("prompt", "anisotropy", "attention")
INDEXED = ("amg", "amg-released", "amg-paper", "amg-strong", "amg-early", "rejection")
# Settings that may be `auto`, the model's calibrated threshold: name → field of the job's settings, and of these.
AUTO = {
    "prompt": ("prompt", "target"),
    "basin": ("basin", "least"),
    "opposite": ("basin", "least"),
    "noise": ("noise", "target"),
}


def names(guidance: str) -> list[str]:
    """The names in ``guidance``; none of ``none``.

    Raises:
        UsageError: one is unknown, or stands twice.
    """
    if guidance in ("", "none"):
        return []
    found = guidance.split("+")
    for name in found:
        if name not in SETTINGS and plugins.find(plugins.GUIDANCE, name, "--guidance") is None:
            known = plugins.choices(plugins.GUIDANCE, ["none", *SETTINGS])
            raise UsageError(f"--guidance {guidance}: {name!r} is not known; choose of {known}, or several joined by +")
    if len(set(found)) < len(found):
        raise UsageError(f"--guidance {guidance}: a name stands twice")
    for later, name in enumerate(found):
        changed = [before for before in found[:later] if before in EMBEDDINGS]
        if name in WORDS and changed:
            raise UsageError(
                f"--guidance {guidance}: {name} would put other words in the place of those that {changed[0]} has "
                f"worked on: write {name}+{changed[0]}"
            )
    return found


def needs_index(guidance: str) -> bool:
    """Whether one of the names looks images up in the training set."""
    return any(name in INDEXED for name in names(guidance))


def used(config: SampleConfig) -> list[str]:
    """The names in ``config.guidance``, and AMG where it joins them because of ``never_above``."""
    found = names(config.guidance)
    joins = config.never_above is not None and not any(isinstance(_chosen(name, config), AMGConfig) for name in found)
    return [*found, "amg"] if joins else found


def settings(config: SampleConfig) -> dict[str, dict[str, Any]]:
    """The settings of each name that is used, and no others."""
    return {name: asdict(_chosen(name, config)) for name in used(config)}


def _chosen(name: str, config: SampleConfig) -> Any:
    """The settings that a name stands for."""
    return SETTINGS[name](config) if name in SETTINGS else Own(plugins.identity(_own(name)))


def _own(name: str) -> Any:
    return plugins.make(plugins.GUIDANCE, name, "--guidance", ("name", "start"), "train.sampling.guidance.Guidance")


def check(config: SampleConfig) -> None:
    """Raise UsageError if a name is unknown, or a setting of one that is used makes no sense."""
    for name in used(config):
        chosen = _chosen(name, config)
        if isinstance(chosen, Own):
            continue
        if not isinstance(chosen, AMGConfig):
            configured(type(chosen), chosen, {})
            continue
        try:
            chosen.resolved()
        except ValueError as error:
            raise UsageError(str(error)) from error
        if chosen.preset == "pixels":
            raise UsageError("amg.preset pixels is not on the scale of an index: choose views, main, strong or early")


def automatic(config: SampleConfig) -> list[tuple[str, str]]:
    """``(term, setting)`` of each setting that is used and ``auto``, checked against the model's thresholds.

    Raises:
        UsageError: the model has none, none of the setting's form, or none against this negative prompt.
    """
    found = [AUTO[name] for name in names(config.guidance) if name in AUTO]
    found = [(term, name) for term, name in dict.fromkeys(found) if getattr(getattr(config, term), name) == "auto"]
    thresholds = model_thresholds(config.model) if found else None
    for term, name in found:
        if thresholds is None:
            raise UsageError(
                f"--{term}.{name} auto: {config.model} has no {FILE}; `train detect --calibrate 0.01` writes it, "
                "or give a number"
            )
        if why := thresholds.unlike(config.negative_prompt):
            raise UsageError(f"--{term}.{name} auto: {Path(config.model) / FILE}: {why}; give a number")
        form = getattr(config, term).form
        if form != thresholds.form:
            raise UsageError(
                f"--{term}.{name} auto: {Path(config.model) / FILE} has thresholds of the form {thresholds.form}, "
                f"but {term}.form is {form}"
            )
    return found


def with_thresholds(config: SampleConfig, thresholds: Thresholds | None, t: float, timesteps: int) -> SampleConfig:
    """``config`` with a number in the place of every ``auto`` that is used: the threshold at timestep ``t``.

    Raises:
        UsageError: nothing was calibrated at ``t``.
    """
    for term, name in automatic(config):
        if thresholds is None:
            raise UsageError(f"--{term}.{name} auto: the thresholds of {config.model} do not hold here: give a number")
        value = thresholds.at(t, timesteps)
        if value is None:
            raise UsageError(
                f"--{term}.{name} auto: nothing in {Path(config.model) / FILE} is for timestep {t:g}, the first here: "
                "calibrate with as many num_inference_steps, or give a number"
            )
        config = replace(config, **{term: replace(getattr(config, term), **{name: value})})
    return config


def restarts(config: SampleConfig) -> tuple[int, float | None]:
    """How often an image is drawn again that is a copy in the end, and above which similarity one that was guided.

    As the AMG that is used asks for: 0 and None of any other.
    """
    chosen = [_chosen(name, config) for name in names(config.guidance)]
    amg = [one.resolved() for one in chosen if isinstance(one, AMGConfig)]
    most = max(amg, key=lambda one: one.restarts or 0, default=None)
    return (most.restarts or 0, most.guided_limit) if most else (0, None)


def make(
    config: SampleConfig, index: TrainingIndex | None, embedder: Embedder | None, views: Sequence[View] = ()
) -> tuple[list[Guidance], Rejection | None]:
    """The terms of the loop, and what stands around it.

    Raises:
        UsageError: a setting is wrong; names it.
    """
    terms: list[Guidance] = []
    rejection = None
    for name in names(config.guidance):
        chosen = _chosen(name, config)
        if isinstance(chosen, Own):
            terms.append(_own(name))
        elif name in INDEXED:
            assert index is not None and embedder is not None  # the job saw to it
            if name == "rejection":
                rejection = Rejection(index, embedder, chosen)
            else:
                terms.append(AMG(index, embedder, chosen, views=views))
        else:
            terms.append(TERMS[name](chosen))
    return terms, rejection

