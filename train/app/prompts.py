"""What the page says of a prompt: its magnitude among clean prompts, its words, and two images of one seed."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from afresh.errors import UsageError
from train.app.bench import Bench
from train.app.config import AppConfig
from train.app.strength import with_strength
from train.denoising.families.registry import denoiser_of
from train.memorization.config import MEMORIZED
from train.memorization.explaining.changes import without
from train.memorization.explaining.explanation import WORD, Explanation, Word
from train.memorization.explaining.job import judged
from train.memorization.explaining.significance import explain
from train.memorization.neurons.blocking import blocked
from train.memorization.neurons.value_neurons import Neurons
from train.memorization.scoring import score
from train.memorization.thresholds import model_thresholds
from train.prompts import Prompt, read_prompts
from train.sampling.config import SampleConfig
from train.sampling.job.drawing import draw_images
from train.sampling.job.records import Task
from train.sampling.terms import registry
from train.sampling.terms.amg_strengths import schedule

if TYPE_CHECKING:
    from curate.index.training_index import TrainingIndex


LONGEST = 1000
"""Characters of a prompt; the text encoders read fewer."""
GROUP = 4
"""Clean prompts scored at a time: the model is free for others in between."""


@dataclass
class Scale:
    """Magnitudes of clean prompts, which more join while they are scored."""

    captions: Sequence[str]
    source: str
    """What they are, in words."""
    magnitudes: list[float] = field(default_factory=list)
    """Sorted."""

    def add(self, found: Sequence[float]) -> None:
        """Take some more."""
        self.magnitudes = sorted([*self.magnitudes, *found])

    def share_below(self, m: float) -> float | None:
        """The share of the clean prompts whose magnitude is lower; None before any was scored."""
        return bisect.bisect_left(self.magnitudes, m) / len(self.magnitudes) if self.magnitudes else None


def clean_and_examples(config: AppConfig, index: TrainingIndex | None) -> tuple[Scale, list[str]]:
    """The prompts of the scale, drawn by a fixed seed where there are many, and prompts to try.

    Args:
        config: of the page.
        index: of the training set, if there is one.
    """
    if config.prompts:
        prompts = read_prompts(config.prompts)
        clean = [prompt.caption for prompt in prompts if prompt.label == 0]
        examples = [prompt.caption for prompt in prompts if prompt.label != 0]
        return Scale(_some(clean, config.clean), "clean prompts"), list(dict.fromkeys(examples))[:50]
    if index is None:
        return Scale([], ""), []
    once = np.flatnonzero((index.group_counts == 1) & (index.counts == 1))
    order = np.argsort(-index.group_counts, kind="stable")
    often = order[(index.group_counts[order] > 1) & index.kept[order]][:50]
    captions = [str(index.captions[row]) for row in _some(once.tolist(), config.clean)]
    repeated = [index.captions[row] for row in often.tolist()]
    return (
        Scale(captions, "captions that occur once in the training set"),
        list(dict.fromkeys(text for text in repeated if text)),
    )


def _some(values: Sequence[Any], most: int) -> list[Any]:
    if len(values) <= most:
        return list(values)
    return [values[i] for i in np.sort(np.random.default_rng(0).choice(len(values), most, replace=False))]


def words_of(prompt: str) -> list[Word]:
    """The words of a prompt and its punctuation, without tokens: nothing is known of them yet."""
    return [Word(match[0], match.start(), match.end(), (), math.nan) for match in WORD.finditer(prompt)]


def asked(prompt: str, struck: Sequence[int]) -> str:
    """The prompt without the words of these numbers, of :func:`words_of`."""
    words = words_of(prompt)
    return without(prompt, *(words[number] for number in sorted(set(struck)) if 0 <= number < len(words)))


def checked(prompt: str) -> str:
    """A prompt that the page takes.

    Raises:
        UsageError: it is empty or too long.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty: write some words")
    if len(prompt) > LONGEST:
        raise UsageError(f"the prompt has {len(prompt):,} characters: the page takes {LONGEST:,}")
    return prompt


@dataclass(frozen=True)
class Reader:
    """Magnitudes and words, by the model."""

    bench: Bench
    config: AppConfig
    scale: Scale

    def read(self, client: str, prompt: str, struck: Sequence[int] = ()) -> dict[str, Any]:
        """What :func:`reading` gives, of a prompt without some of its words.

        Raises:
            UserError: nothing is left of the prompt, it is too long, or the client stopped it.
        """
        rest = checked(asked(checked(prompt), struck))
        config = self.config
        with self.bench.alone(client) as pipe:
            explanation = explain(
                pipe,
                rest,
                steps=config.steps,
                num_inference_steps=config.num_inference_steps,
                seeds=config.seeds,
                guidance_scale=config.scale,
            )[0]
            denoiser = denoiser_of(pipe)
            verdict = judged(
                explanation,
                model_thresholds(config.model),
                "l2",
                math.prod(denoiser.shape),
                denoiser.schedule.timesteps,
            )
        return reading(prompt, struck, explanation, verdict, self.scale)

    def score_clean(self) -> None:
        """Score the scale's prompts, a few at a time, behind whoever waits for the model."""
        config = self.config
        for start in range(0, len(self.scale.captions), GROUP):
            while self.bench.waiting:
                time.sleep(0.05)
            with self.bench.alone("the scale") as pipe:
                found = score(
                    pipe,
                    self.scale.captions[start : start + GROUP],
                    steps=config.steps,
                    num_inference_steps=config.num_inference_steps,
                    seeds=config.seeds,
                    guidance_scale=config.scale,
                )
            self.scale.add(found.per_prompt("magnitude").tolist())


def reading(
    prompt: str, struck: Sequence[int], explanation: Explanation, verdict: dict[str, Any], scale: Scale
) -> dict[str, Any]:
    """What is shown of a prompt.

    Args:
        prompt: as it was written.
        struck: numbers of its words that were struck.
        explanation: of what is left of it.
        verdict: of :func:`~train.memorization.explaining.job.judged`.
        scale: of clean prompts.

    Returns:
        ``magnitude``; ``share``, of clean prompts that are below it (None without any), ``clean``, how many there are,
        of ``planned``, and their ``source`` and ``magnitudes``; the verdict; ``asked``, the prompt without what was
        struck; ``words``, each with ``number``, ``text``, ``point`` (punctuation), ``struck``, ``seen``,
        ``significance`` and ``weight``, its share of the highest.
    """
    found = iter([word for word in explanation.words() if not word.punctuation])
    highest = max((word.significance for word in explanation.ranked()), default=0.0)
    words, gone = [], set(struck)
    for number, word in enumerate(words_of(prompt)):
        known = None if word.punctuation or number in gone else next(found, None)
        value = known.significance if known is not None and known.tokens else None
        words.append(
            {
                "number": number,
                "text": word.text,
                "point": word.punctuation,
                "struck": number in gone,
                "seen": known is None or bool(known.tokens),
                "significance": value,
                "weight": value / highest if value and highest > 0 else 0.0,
            }
        )
    m = explanation.magnitude
    return {
        "magnitude": m,
        "share": scale.share_below(m),
        "clean": len(scale.magnitudes),
        "planned": len(scale.captions),
        "source": scale.source,
        "magnitudes": list(scale.magnitudes),
        "asked": explanation.prompt,
        "words": words,
        **verdict,
    }


def choices(with_index: bool) -> list[str]:
    """The guidances that the page offers."""
    return [name for name in registry.SETTINGS if with_index or name not in registry.INDEXED]


def settings(
    sampling: SampleConfig, guidance: Sequence[str], strength: float, steps: int, scale: float
) -> tuple[SampleConfig, SampleConfig]:
    """The settings of the plain and of the mitigated image.

    With an index, AMG that does nothing stands behind whatever guides, so that the trace has the similarity of every
    step.

    Args:
        sampling: of the session.
        guidance: names, in their order; none of them may be a part of one's own, which is code.
        strength: see :func:`~train.app.strength.with_strength`.
        steps: denoising steps.
        scale: classifier-free guidance scale.

    Raises:
        UsageError: a name is not offered, or numbers are out of range.
    """
    for name in guidance:
        if name not in choices(bool(sampling.index)):
            raise UsageError(f"guidance {name!r} is not offered: choose of {', '.join(choices(bool(sampling.index)))}")
    several = [name for name in guidance if name.startswith("amg")]
    if len(several) > 1:
        raise UsageError(f"{' and '.join(several)} are presets of one guidance: choose one of them")
    if not 1 <= steps <= 200 or not 0 <= scale <= 50:
        raise UsageError("images take 1 to 200 steps, at a guidance scale from 0 to 50")
    base = replace(sampling, steps=int(steps), scale=float(scale))
    watch = replace(base.amg, despecification=False, deduplication=False, dissimilarity=False, decoder="linear")
    watched = replace(base, guidance="amg", amg=watch) if base.index else base
    guided = with_strength(base, guidance, strength)
    names = list(guidance) or ["none"]
    if base.index and not several:
        guided = replace(guided, amg=watch)
        names = [*guidance, "amg"]
    guided = replace(guided, guidance="+".join(names))
    registry.check(guided)
    return watched, guided


def limits(config: SampleConfig, trace: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """``(t, λ_t)`` of the steps of a trace, by the AMG among the guidance."""
    name = next(one for one in reversed(config.guidance.split("+")) if one.startswith("amg"))
    threshold = schedule(registry.SETTINGS[name](config).resolved())
    return [(row["t"], threshold(row["t"])) for row in trace]


def draw(
    bench: Bench, client: str, config: SampleConfig, prompt: str, seed: int, without_neurons: Neurons | None = None
) -> dict[str, Any]:
    """One image and what is known of it: its record (:mod:`train.sampling.job.drawing`), ``image``, and whether it is
    ``copied`` from its nearest training image.

    Raises:
        UserError: the prompt or the seed cannot be taken, or the client stopped it.
    """
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed is {seed}: expected a number from 0")
    with bench.alone(client) as pipe, blocked(pipe, without_neurons) if without_neurons else nullcontext():
        task = Task(0, Prompt(checked(prompt)), int(seed))
        _, image, record = next(iter(draw_images(config, bench.opened, [task])))
    return {**record, "image": image, "copied": record["similarity"] is not None and record["similarity"] > MEMORIZED}
