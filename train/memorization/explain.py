"""Explanation: which words of a prompt its memorization hangs on.

Wen et al., "Detecting, Explaining, and Mitigating Memorization in Diffusion Models" (ICLR 2024), §4.2: the significance
of a token is how strongly the magnitude answers to its embedding, and the words to change first are the most
significant ones.

    from train.memorization import explain, suggest
    explanation = explain(pipe, "grinning face, face smiling")[0]
    [(word.text, word.significance) for word in explanation.ranked()]
    suggest(pipe, explanation)         # the magnitude without each of the first words, and with others in their place
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from curate.console import Progress, UsageError, UserError, get_logger, progress, write_atomic, write_json
from train.components import (
    FLOAT16_GAIN,
    encode_captions,
    frozen,
    initial_noise,
    latent_shape,
    open_pipeline,
)
from train.memorization.config import ExplainConfig
from train.memorization.magnitude import Form, magnitude, to_eps
from train.memorization.score import score
from train.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Kind = Literal["word", "begin", "end", "padding"]
Floats = NDArray[np.float32]

# A word keeps its apostrophes and hyphens; everything else that is not space is punctuation, in runs.
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")


@dataclass(frozen=True)
class Token:
    """One token of the text encoder's input."""

    text: str
    """The characters that it stands for; the name of a special token."""
    kind: Kind
    start: int
    """Where in the prompt its characters are; equal to ``end`` for a special token."""
    end: int


@dataclass(frozen=True)
class Word:
    """A word of the prompt, or a run of punctuation, with its tokens."""

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]
    """Positions in the text encoder's input; empty where the model does not see the word, behind its token limit."""
    significance: float
    """``≥ 0``; NaN where the model does not see it."""

    @property
    def punctuation(self) -> bool:
        """Whether it has neither letter nor digit."""
        return not any(character.isalnum() for character in self.text)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found of one prompt."""

    prompt: str
    tokens: tuple[Token, ...]
    significance: Floats
    """``[seeds, steps, tokens]``: ``‖∂m_t/∂e_i‖₂``."""
    magnitudes: Floats
    """``[seeds, steps]``: ``m_t``."""
    seeds: NDArray[np.int64]
    """``[seeds]``: of the initial noises."""
    timesteps: NDArray[np.int64]
    """``[steps]``."""

    @property
    def magnitude(self) -> float:
        """The detection score: ``m_t``, averaged over steps and seeds."""
        return float(self.magnitudes.mean())

    def per_token(self) -> Floats:
        """``SS_i`` of every token, specials among them: ``[tokens]``, averaged over steps and seeds."""
        return self.significance.mean(axis=(0, 1))

    def joint(self, positions: Sequence[int]) -> float:
        """Significance of several tokens taken as one: the mean norm of the gradient by all of their embeddings.

        For one token this is its ``SS_i``; of several, ``‖∂m_t/∂(e_i, e_j, …)‖² = Σ ‖∂m_t/∂e_i‖²``.
        """
        return float(np.sqrt(np.square(self.significance[..., list(positions)], dtype=np.float64).sum(-1)).mean())

    def words(self) -> list[Word]:
        """The words and the punctuation, in the order of the prompt."""
        found = []
        for match in _WORD.finditer(self.prompt):
            positions = tuple(
                position
                for position, token in enumerate(self.tokens)
                if token.kind == "word" and token.start < match.end() and match.start() < token.end
            )
            significance = self.joint(positions) if positions else float("nan")
            found.append(Word(match[0], match.start(), match.end(), positions, significance))
        return found

    def ranked(self) -> list[Word]:
        """The words that the model sees, the most significant first, without punctuation: what to change, in order."""
        words = [word for word in self.words() if word.tokens and not word.punctuation]
        return sorted(words, key=lambda word: -word.significance)

    def specials(self) -> dict[str, float]:
        """Significance of the tokens that stand for no word: ``begin``, ``end`` and all of the ``padding`` as one.

        A CLIP text encoder is causal: what comes last has read the whole prompt, so these are often the highest.
        They cannot be changed by other words alone, and are no part of :meth:`ranked`.
        """
        kinds = [token.kind for token in self.tokens]
        positions = {kind: [i for i, one in enumerate(kinds) if one == kind] for kind in ("begin", "end", "padding")}
        return {kind: self.joint(where) for kind, where in positions.items() if where}

    def as_json(self) -> dict[str, Any]:
        """Prompt, magnitudes, words with their tokens, specials and the order in which to change words."""
        per_token = self.per_token()
        return {
            "prompt": self.prompt,
            "magnitude": self.magnitude,
            "magnitude_by_step": self.magnitudes.mean(axis=0).tolist(),
            "seeds": self.seeds.tolist(),
            "words": [
                {
                    "word": word.text,
                    "significance": word.significance,
                    "seen": bool(word.tokens),
                    "tokens": [
                        {"token": self.tokens[i].text, "significance": float(per_token[i])} for i in word.tokens
                    ],
                }
                for word in self.words()
            ],
            "specials": self.specials(),
            "change_first": [word.text for word in self.ranked()],
        }


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


def token_significance(m: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """``‖∂m/∂e_i‖₂`` of each image and token (Wen et al., §4.2).

    Args:
        m: ``[n]``, each image's magnitude, a function of its own row of ``embeds`` alone.
        embeds: ``[n, tokens, width]``, a leaf that requires gradients.

    Returns:
        ``[n, tokens]`` float32.
    """
    (gradient,) = torch.autograd.grad(m.sum(), embeds)  # rows do not mix: the sum keeps every image's own gradient
    return torch.linalg.vector_norm(gradient.float(), dim=2)


def explain(
    pipe: StableDiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    steps: int = 10,
    num_inference_steps: int = 50,
    seeds: int | Sequence[int] | NDArray[np.int64] = 4,
    guidance_scale: float = 7.5,
    form: Form = "l2",
    batch_size: int = 8,
    gradient_checkpointing: bool = False,
    bar: Progress | None = None,
) -> list[Explanation]:
    """Significance of every token: ``SS_i = (1/T) Σ_t ‖∂m_t/∂e_i‖₂`` (Wen et al., §4.2), per seed and step.

    ``e_i`` is the i-th embedding of the text encoder's output for the prompt, the conditional half; ``m_t`` is in
    ε-space and per image. The guided DDIM trajectory is followed without gradients: each step's gradient goes through
    one UNet call. Memory is that of ``batch_size`` images with gradients, and as many without.

    Args:
        pipe: any Stable Diffusion pipeline; nothing of it is changed.
        prompts: one or several.
        steps: the paper's T, from the first step (t near T) on.
        num_inference_steps: steps of the whole trajectory.
        seeds: how many (0, 1, …), or which ones; ``[prompts, seeds]`` gives each prompt its own.
        guidance_scale: classifier-free guidance scale that the trajectory follows.
        form: of the magnitude; ``"rms"`` divides magnitude and significance by the root of a latent's size.
        batch_size: prompt and seed pairs per UNet call.
        gradient_checkpointing: see :func:`train.components.frozen`; for large models.
        bar: told of each pair that is done.

    Raises:
        UsageError: no prompt, no seed, or ``steps`` out of range.
        UserError: a magnitude or a gradient is not finite.
    """
    from diffusers import DDIMScheduler

    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not 1 <= steps <= num_inference_steps:
        raise UsageError(f"steps is {steps}: expected 1 to num_inference_steps, which is {num_inference_steps}")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: expected at least 1")
    table = np.arange(seeds) if isinstance(seeds, int) else np.asarray(seeds, np.int64)
    table = np.broadcast_to(table, (len(prompts), table.shape[-1]))
    if table.size == 0:
        raise UsageError("nothing to explain: there must be at least one prompt and one seed")

    unet = pipe.unet
    device, dtype, shape = unet.device, unet.dtype, latent_shape(unet)
    gain = FLOAT16_GAIN if dtype == torch.float16 else 1.0
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps[:steps].tolist()
    empty, encoded = encode_captions(pipe, [""]), encode_captions(pipe, prompts)

    pairs = [(row, column) for row in range(len(prompts)) for column in range(table.shape[1])]
    magnitudes = np.empty((*table.shape, steps), np.float32)
    significance = np.empty((*table.shape, steps, encoded.shape[1]), np.float32)
    with frozen(unet, checkpointing=gradient_checkpointing):
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            x_t = torch.stack([initial_noise(shape, int(table[pair])) for pair in batch]).to(device, dtype)
            x_t = x_t * scheduler.init_noise_sigma
            embeds = encoded[[row for row, _ in batch]].float().requires_grad_()
            for step, t in enumerate(timesteps):
                options = {"return_dict": False}
                with torch.no_grad():
                    uncond = unet(x_t, t, encoder_hidden_states=empty.expand_as(embeds), **options)[0].float()
                cond = unet(x_t, t, encoder_hidden_states=embeds.to(dtype), **options)[0].float()
                alpha_bar, prediction_type = scheduler.alphas_cumprod[t], scheduler.config.prediction_type
                m = magnitude(
                    to_eps(cond, x_t.float(), alpha_bar, prediction_type),
                    to_eps(uncond, x_t.float(), alpha_bar, prediction_type),
                    form=form,
                )
                found = token_significance(m * gain, embeds) / gain
                for i, pair in enumerate(batch):
                    magnitudes[(*pair, step)] = m[i].item()
                    significance[(*pair, step)] = found[i].cpu().numpy()
                if step + 1 < steps:
                    guided = uncond + guidance_scale * (cond.detach() - uncond)
                    x_t = scheduler.step(guided, t, x_t.float(), return_dict=False)[0].to(dtype)
            if bar is not None:
                bar.update(len(batch))

    explanations = []
    for row, prompt in enumerate(prompts):
        if not (np.isfinite(magnitudes[row]).all() and np.isfinite(significance[row]).all()):
            raise UserError(f"prompt {prompt!r}: its magnitudes or gradients are not finite; try dtype float32")
        tokens = read_tokens(pipe, prompt)
        at = np.array(timesteps, np.int64)
        explanations.append(Explanation(prompt, tokens, significance[row], magnitudes[row], table[row].copy(), at))
    return explanations


def read_tokens(pipe: StableDiffusionPipeline, prompt: str) -> tuple[Token, ...]:
    """The text encoder's input for a prompt, token by token (see :func:`train.components.tokenize`)."""
    tokenizer = pipe.tokenizer
    encoded = tokenizer(
        prompt,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    tokens = []
    ended = False
    for position, (number, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        kind: Kind = "word"
        # Stable Diffusion 1.x pads with the end token itself: what follows the first one is padding.
        if position == 0 and number == tokenizer.bos_token_id:
            kind = "begin"
        elif ended:
            kind = "padding"
        elif number == tokenizer.eos_token_id and start == end:
            kind, ended = "end", True
        text = prompt[start:end] if kind == "word" else tokenizer.convert_ids_to_tokens(number)
        tokens.append(Token(text, kind, start, end))
    return tuple(tokens)


def without(prompt: str, word: Word, replacement: str = "") -> str:
    """The prompt with another word in that place, or none; then spaces and separators that stand alone go too."""
    changed = prompt[: word.start] + replacement + prompt[word.end :]
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
    replaced by entries of the tokenizer's vocabulary, drawn at random. As a control the least significant word is
    removed too: significance says what to change if that does less.

    Args:
        pipe: the pipeline that was explained.
        explanation: of a prompt.
        words: how many are tried, one at a time.
        replacements: random words for each.
        instead: a prompt to measure beside them; empty for none.
        num_inference_steps, guidance_scale, form: as they were for :func:`explain`.
        batch_size: prompt and seed pairs per UNet call.
        seed: of the random words.
    """
    ranked = explanation.ranked()
    chosen = ranked[:words]
    changes = [Change("instead", "", instead, 0.0)] if instead else []
    changes += [Change("removed", word.text, without(explanation.prompt, word), 0.0) for word in chosen]
    if chosen and len(ranked) > len(chosen):
        changes.append(Change("control", ranked[-1].text, without(explanation.prompt, ranked[-1]), 0.0))
    others = vocabulary_words(pipe, explanation.prompt)
    draw = np.random.default_rng(seed)
    for word in chosen if others else []:
        for replacement in draw.choice(others, min(replacements, len(others)), replace=False).tolist():
            changes.append(Change("replaced", word.text, without(explanation.prompt, word, replacement), 0.0))
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


def vocabulary_words(pipe: StableDiffusionPipeline, prompt: str) -> list[str]:
    """The vocabulary's tokens of four letters and more that end a word, sorted, without the prompt's own words.

    Most are words by themselves; some are endings of words, which a byte-pair vocabulary does not tell apart.
    """
    known = {word.casefold() for word in _WORD.findall(prompt)}
    words = {token.removesuffix("</w>") for token in pipe.tokenizer.get_vocab() if token.endswith("</w>")}
    return sorted(word for word in words if len(word) > 3 and word.isascii() and word.isalpha() and word not in known)


class ExplainSummary(dict[str, Any]):
    """The job's summary; on a terminal it is shown as bars."""

    def view(self, *, colour: bool = False) -> str:
        """See :func:`train.memorization.strip.terminal_view`."""
        from train.memorization.strip import terminal_view

        parts = [terminal_view(row, colour=colour) for row in self["explanations"]]
        if len(parts) > 1 and "left_without_most" in self:
            most, least = (100 * self[key] for key in ("left_without_most", "left_without_least"))
            parts.append(
                f"{len(parts)} prompts: {most:.0f} % of the magnitude is left without the most significant word, "
                f"{least:.0f} % without the least significant one"
            )
        return "\n\n".join(parts)


def run_explain(config: ExplainConfig) -> ExplainSummary:
    """The job behind ``train explain``: explain, try changes, write the page.

    Returns:
        ``explanations``, one a prompt (see :meth:`Explanation.as_json`), each with its ``changes``; the mean share of
        the magnitude that is left without the most and without the least significant word, in ``left_without_most`` and
        ``left_without_least`` (over the prompts that have both); the settings.

    Raises:
        UserError: the prompts or the model cannot be used.
    """
    from train.memorization.strip import render

    prompts = _read(config)
    first = [config.first_seed if prompt.seed is None else prompt.seed for prompt in prompts]
    seeds = np.array(first)[:, None] + np.arange(config.seeds)
    pipe = open_pipeline(config)
    trajectory: dict[str, Any] = {
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.scale,
        "form": config.form,
        "batch_size": config.batch_size,
    }
    start = time.perf_counter()
    rows = []
    with progress(total=seeds.size, desc="explain", unit="trajectories") as bar:
        explanations = explain(
            pipe,
            [prompt.caption for prompt in prompts],
            steps=config.steps,
            seeds=seeds,
            gradient_checkpointing=config.gradient_checkpointing,
            bar=bar,
            **trajectory,
        )
    options: dict[str, Any] = {"words": config.words, "replacements": config.replacements, "instead": config.instead}
    for explanation in progress(explanations, desc="changes", unit="prompts"):
        changes = suggest(pipe, explanation, **options, **trajectory)
        rows.append(explanation.as_json() | {"changes": [vars(change) for change in changes]})
    summary = ExplainSummary(
        explanations=rows,
        **_left(rows),
        steps=config.steps,
        num_inference_steps=config.num_inference_steps,
        seeds=config.seeds,
        scale=config.scale,
        form=config.form,
        model=config.model,
        seconds_per_prompt=(time.perf_counter() - start) / len(prompts),
    )
    if config.out:
        out = Path(config.out)
        with write_atomic(out) as temporary:
            temporary.write_text(render(summary), encoding="utf-8")
        write_json(out.with_suffix(".json"), summary)
        get_logger(__name__).info(f"wrote {out}")
    return summary


def _read(config: ExplainConfig) -> list[Prompt]:
    if bool(config.prompt) == bool(config.prompts):
        raise UsageError("train explain needs either --prompt or --prompts")
    if config.instead and not config.prompt:
        raise UsageError("--instead goes with --prompt, not with a file of prompts")
    if config.out and Path(config.out).suffix != ".html":
        raise UsageError(f"out is {config.out!r}: expected a file that ends in .html")
    for option, least in (("seeds", 1), ("steps", 1), ("words", 0), ("replacements", 0), ("batch_size", 1)):
        if getattr(config, option) < least:
            raise UsageError(f"{option} is {getattr(config, option)}: expected at least {least}")
    if config.steps > config.num_inference_steps:
        raise UsageError(f"steps is {config.steps}: there are {config.num_inference_steps} (num_inference_steps)")
    return [Prompt(config.prompt)] if config.prompt else read_prompts(config.prompts)


def _left(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean shares of the magnitude that are left without the most and without the least significant word."""
    most, least = [], []
    for row in rows:
        removed = [change for change in row["changes"] if change["kind"] == "removed"]
        control = [change for change in row["changes"] if change["kind"] == "control"]
        if removed and control and row["magnitude"] > 0:
            most.append(removed[0]["magnitude"] / row["magnitude"])
            least.append(control[0]["magnitude"] / row["magnitude"])
    return {"left_without_most": float(np.mean(most)), "left_without_least": float(np.mean(least))} if most else {}
