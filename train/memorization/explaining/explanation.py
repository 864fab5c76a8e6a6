"""What was found of a prompt: its tokens, its words, and how significant each is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


Kind = Literal["word", "begin", "end", "padding"]
Floats = NDArray[np.float32]
# A word keeps its apostrophes and hyphens; everything else that is not space is punctuation, in runs.
WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")


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
    """What :func:`~train.memorization.explain` found of one prompt."""

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
        for match in WORD.finditer(self.prompt):
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


def read_tokens(
    pipe: StableDiffusionPipeline,
    prompt: str,
    sequence: Sequence[tuple[str, int]] | None = None,
    frame: tuple[str, str] | None = None,
) -> tuple[Token, ...]:
    """The text encoders' input for a prompt, token by token.

    Args:
        pipe: with the tokenizers.
        prompt: any text.
        sequence: the tokenizers of the family's sequence by name, and how many tokens each has; None for the one.
        frame: the text that the family puts before and after a prompt, whose tokens are of the kinds ``begin`` and
            ``end``; None where it puts none.
    """
    sequence = sequence or [("tokenizer", pipe.tokenizer.model_max_length)]
    read = [_read(getattr(pipe, name), length, prompt, frame) for name, length in sequence]
    return tuple(token for tokens in read for token in tokens)


def _read(tokenizer: Any, length: int, prompt: str, frame: tuple[str, str] | None) -> list[Token]:
    if tokenizer is None:  # an encoder that the model does without: its places are empty
        return [Token("", "padding", 0, 0)] * length
    encoded = tokenizer(
        prompt.join(frame or ("", "")),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if frame is not None:
        return _within(tokenizer, prompt, len(frame[0]), encoded)
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
    return tokens


def _within(tokenizer: Any, prompt: str, first: int, encoded: Any) -> list[Token]:
    """The tokens of a text in which the prompt begins at the character ``first``."""
    tokens = []
    for number, (start, end), counts in zip(
        encoded["input_ids"], encoded["offset_mapping"], encoded["attention_mask"], strict=True
    ):
        start, end = start - first, end - first
        if counts and 0 <= start < end <= len(prompt):
            tokens.append(Token(prompt[start:end], "word", start, end))
            continue
        kind: Kind = "padding" if not counts else "begin" if start < 0 else "end"
        tokens.append(Token(tokenizer.convert_ids_to_tokens(number), kind, 0, 0))
    return tokens
