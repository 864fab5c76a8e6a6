"""Random words or numbers in the prompt: the cheap baselines.

Source: Somepalli et al., "Understanding and Mitigating Copying in Diffusion Models" (NeurIPS 2023, arXiv 2305.20086):
four random words of the vocabulary, four random numbers, or four of the prompt's own words again, each at a
random place of the prompt. As in the released code, a word is a token of the vocabulary as text, which the tokenizer
may split again.
"""

from __future__ import annotations

from typing import Any

import torch

from train.sampling.config import TokensConfig, configured
from train.sampling.guidance import Change, Run, Start, StepFunction

MOST = 100_000  # numbers are below this


class RandomTokens:
    """A term that works before the first step only; see the module.

    Every image has its own, drawn from its own noise. The trace of the first step gets ``prompt_drawn``.

    Args:
        config: settings.
        optional: leave prompts alone that are not known as text; or else they are an error.
        overrides: fields of :class:`TokensConfig` to set otherwise.
    """

    name = "tokens"

    def __init__(self, config: TokensConfig | None = None, *, optional: bool = False, **overrides: Any) -> None:
        self.config, self.optional = configured(TokensConfig, config, overrides), optional

    def start(self, run: Run) -> StepFunction:
        """Nothing happens after the first step."""
        return lambda state: None

    def prepare(self, start: Start) -> Change | None:
        """Embeddings of the changed prompts.

        Raises:
            ValueError: the prompts are not known as text.
        """
        if start.prompts is None or start.run.tokenizer is None:
            if self.optional:
                return None
            raise ValueError("random tokens need prompts as text, not as embeddings")
        if self.config.number == 0:
            return None
        texts = [
            with_random_words(text, self.config, start.run.tokenizer, start.generator(image, self.name))
            for image, text in enumerate(start.prompts)
        ]
        rows = torch.arange(start.run.batch_size, device=start.x_t.device)
        return Change(rows, cond=start.run.encode_prompts(texts), prompts=texts, columns={"prompt_drawn": texts})


def with_random_words(text: str, c: TokensConfig, tokenizer: Any, generator: torch.Generator) -> str:
    """``text`` with ``c.number`` words more."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    special = set(tokenizer.all_special_ids)
    words = text.split()
    own = list(words)
    for _ in range(c.number):
        if c.kind == "number":
            word = str(below(MOST))
        elif c.kind == "word":
            while (token := below(len(tokenizer))) in special:
                pass
            word = tokenizer.decode([token]).strip()
        else:
            word = own[below(len(own))] if own else ""
        words.insert(below(len(words) + 1), word)
    return " ".join(words)

