"""The magnitude of changed prompts: without the most significant words, and with others in their place."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from train.memorization.explaining.explanation import WORD, Explanation, Word
from train.memorization.explaining.words import WORDS
from train.memorization.scoring import score
from train.memorization.signals.magnitude import Form

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class Change:
    """A changed prompt and its magnitude."""

    kind: Literal["removed", "replaced", "control", "instead"]
    """``control``: the least significant word was removed; ``instead``: the prompt was given."""
    word: str
    """That was removed or replaced; empty for ``instead``."""
    prompt: str
    magnitude: float
    """Averaged over the same steps and seeds as the explanation's."""


def without(prompt: str, *words: Word, replacement: str = "") -> str:
    """The prompt with another word for each, or none; spaces and separators that stand alone then go too."""
    changed = prompt
    for word in sorted(words, key=lambda word: -word.start):
        changed = changed[: word.start] + replacement + changed[word.end :]
    if not replacement:
        changed = re.sub(r"\s+([,.;:!?])", r"\1", changed)
        changed = re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", changed)
        changed = re.sub(r"^[\s,;:]+|[\s,;:]+$", "", changed)
    return re.sub(r"\s+", " ", changed).strip()


def suggest(
    pipe: StableDiffusionPipeline,
    explanation: Explanation,
    *,
    words: int = 3,
    replacements: int = 3,
    instead: str = "",
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    form: Form = "l2",
    batch_size: int = 32,
    seed: int = 0,
) -> list[Change]:
    """The magnitude of changed prompts, over the same steps and from the same noises as the explanation.

    Wen et al., §4.2, change the most significant tokens first. Here each of the first ``words`` is removed, and
    replaced by common words, drawn at random (they take the released code's random tokens' place, many of which are no
    words). As a control the least significant word is
    removed too: significance says what to change if that does less.

    Args:
        pipe: the pipeline that was explained.
        explanation: of a prompt.
        words: how many are tried, one at a time.
        replacements: random words for each.
        instead: a prompt to measure beside them; empty for none.
        num_inference_steps, guidance_scale, form: as they were for :func:`~train.memorization.explain`.
        batch_size: prompt and seed pairs per UNet call.
        seed: of the random words.
    """
    ranked = explanation.ranked()
    chosen = ranked[:words]
    changes = [Change("instead", "", instead, 0.0)] if instead else []
    changes += [Change("removed", word.text, without(explanation.prompt, word), 0.0) for word in chosen]
    if chosen and len(ranked) > len(chosen):
        changes.append(Change("control", ranked[-1].text, without(explanation.prompt, ranked[-1]), 0.0))
    others = other_words(explanation.prompt)
    draw = np.random.default_rng(seed)
    for word in chosen:
        for replacement in draw.choice(others, min(replacements, len(others)), replace=False).tolist():
            prompt = without(explanation.prompt, word, replacement=replacement)
            changes.append(Change("replaced", word.text, prompt, 0.0))
    changes = [change for change in changes if change.prompt]
    if not changes:
        return []
    scores = score(
        pipe,
        [change.prompt for change in changes],
        steps=len(explanation.timesteps),
        num_inference_steps=num_inference_steps,
        seeds=explanation.seeds,
        guidance_scale=guidance_scale,
        form=form,
        batch_size=batch_size,
    ).per_prompt("magnitude")
    return [replace(change, magnitude=float(m)) for change, m in zip(changes, scores, strict=True)]


def other_words(prompt: str) -> list[str]:
    """Common words that are none of the prompt's own."""
    known = {word.casefold() for word in WORD.findall(prompt)}
    return [word for word in WORDS if word not in known]
