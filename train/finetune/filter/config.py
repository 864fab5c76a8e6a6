"""Settings of ``train verdicts``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class VerdictsConfig:
    """Which samples of a run are listed as always left out.

    Args:
        run: folder of a finished ``train finetune`` with a filter.
        out: list to write, a line ``shard<TAB>key`` each; ``curate dedup --exclude`` and ``train finetune --exclude``
            read it.
        min_judged: a sample must have been judged at least so often.
        min_share: share of these verdicts that must have been against it.
    """

    run: str = ""
    out: str = ""
    min_judged: int = 3
    min_share: float = 1.0
