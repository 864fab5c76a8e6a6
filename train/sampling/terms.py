"""Guidance by name, for ``train sample``: names joined by ``+`` act in that order, as in ``tokens+amg``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from curate.console import UsageError
from train.sampling.amg import AMG
from train.sampling.basin import AttractionBasin
from train.sampling.config import AMGConfig, SampleConfig, configured
from train.sampling.guidance import Guidance
from train.sampling.noise import NoiseAdjustment
from train.sampling.prompt import PromptMinimisation
from train.sampling.rejection import Rejection
from train.sampling.tokens import RandomTokens

if TYPE_CHECKING:
    from curate.embed import Embedder
    from curate.index import TrainingIndex

# What a name stands for: settings out of the job's, and what is made of them.
SETTINGS: dict[str, Callable[[SampleConfig], Any]] = {
    "amg": lambda c: c.amg,
    "amg-strong": lambda c: replace(c.amg, preset="strong"),
    "amg-early": lambda c: replace(c.amg, preset="early"),
    "prompt": lambda c: c.prompt,
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
    "basin": AttractionBasin,
    "opposite": AttractionBasin,
    "noise": NoiseAdjustment,
    "noise-batch": NoiseAdjustment,
    "tokens": RandomTokens,
    "numbers": RandomTokens,
}
INDEXED = ("amg", "amg-strong", "amg-early", "rejection")


def names(guidance: str) -> list[str]:
    """The names in ``guidance``; none of ``none``.

    Raises:
        UsageError: one is unknown, or stands twice.
    """
    if guidance in ("", "none"):
        return []
    found = guidance.split("+")
    for name in found:
        if name not in SETTINGS:
            known = ", ".join(["none", *SETTINGS])
            raise UsageError(f"--guidance {guidance}: {name!r} is not known; choose of {known}, or several joined by +")
    if len(set(found)) < len(found):
        raise UsageError(f"--guidance {guidance}: a name stands twice")
    return found


def needs_index(guidance: str) -> bool:
    """Whether one of the names looks images up in the training set."""
    return any(name in INDEXED for name in names(guidance))


def settings(config: SampleConfig) -> dict[str, dict[str, Any]]:
    """The settings of each name in ``config.guidance``, and no others."""
    return {name: asdict(SETTINGS[name](config)) for name in names(config.guidance)}


def check(config: SampleConfig) -> None:
    """Raise UsageError if a name is unknown, or a setting of one that is used makes no sense."""
    for name in names(config.guidance):
        chosen = SETTINGS[name](config)
        if not isinstance(chosen, AMGConfig):
            configured(type(chosen), chosen, {})
            continue
        try:
            chosen.resolved()
        except ValueError as error:
            raise UsageError(str(error)) from error


def make(
    config: SampleConfig, index: TrainingIndex | None, embedder: Embedder | None
) -> tuple[list[Guidance], Rejection | None]:
    """The terms of the loop, and what stands around it.

    Raises:
        UsageError: a setting is wrong; names it.
    """
    terms: list[Guidance] = []
    rejection = None
    for name in names(config.guidance):
        chosen = SETTINGS[name](config)
        if name in INDEXED:
            assert index is not None and embedder is not None  # the job saw to it
            if name == "rejection":
                rejection = Rejection(index, embedder, chosen)
            else:
                terms.append(AMG(index, embedder, chosen))
        else:
            terms.append(TERMS[name](chosen))
    return terms, rejection
