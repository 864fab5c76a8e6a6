"""A person's review of a curation: two lists of samples, which the next ``curate dedup`` reads."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from curate.decisions.sample_lists import read_ids, write_ids

Decision = Literal["keep", "exclude"]
DECISIONS: tuple[Decision, ...] = ("keep", "exclude")


class Review:
    """``keep.tsv`` and ``exclude.tsv`` in a folder, written whole at each decision; no sample stands in both.

    Args:
        folder: of the lists; made with the first decision.

    Raises:
        UsageError: a list there cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self.decided: dict[tuple[str, str], Decision] = {}
        for decision in DECISIONS:
            if self.path(decision).is_file():
                self.decided |= dict.fromkeys(read_ids(self.path(decision)), decision)

    def path(self, decision: Decision) -> Path:
        """Of the list of a decision."""
        return self.folder / f"{decision}.tsv"

    def decide(self, sample: tuple[str, str], decision: Decision | None) -> None:
        """Keep a sample, exclude it, or with None take the decision back.

        Args:
            sample: its shard and key, as the ledger has them.
            decision: what is to become of it.

        Raises:
            UserError: the lists cannot be written.
        """
        with self._lock:
            after = {one: before for one, before in self.decided.items() if one != sample}
            if decision is not None:
                after[sample] = decision
            for which in DECISIONS:
                listed = [one for one, decided in after.items() if decided == which]
                if listed or self.path(which).is_file():
                    write_ids(self.path(which), listed)
            self.decided = after

    def listed(self, decision: Decision) -> list[tuple[str, str]]:
        """The samples of a decision, sorted."""
        return sorted(one for one, decided in self.decided.items() if decided == decision)

    def command(self, shards: Sequence[str], out: str) -> str:
        """What curates the set again by these lists; empty without a decision.

        Args:
            shards: what was curated; empty names a place to fill in.
            out: of the curation that was reviewed.
        """
        lists = [f"--{one} {shlex.quote(str(self.path(one)))}" for one in DECISIONS if self.listed(one)]
        if not lists:
            return ""
        sources = " ".join(map(shlex.quote, shards)) or "SHARDS…"
        return f"afresh-curate dedup {sources} {shlex.quote(out.rstrip('/') + '-reviewed')} {' '.join(lists)}"
