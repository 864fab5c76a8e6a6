"""What the page says of a curated set: samples that are near, groups of copies, and why one was dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from afresh.errors import UsageError
from curate.columns import some_rows
from curate.config import SearchConfig
from curate.results.ledger import DROPPED, KEPT, read_ledger
from curate.results.report_page import FILTERED, REASONS, read_summary
from curate.search import run_search
from train.app.pictures import Pictures

PER_PAGE, OF_A_GROUP, FOUND = 6, 24, 24


class CuratedSet:
    """A finished curation, to look at; its ledger is held in memory.

    Args:
        out: folder that ``curate dedup`` wrote.
        pictures: of its samples.

    Raises:
        UserError: ``out`` is no finished curation.
    """

    def __init__(self, out: str, pictures: Pictures) -> None:
        self.out, self.pictures = out, pictures
        self.summary = read_summary(out)
        self.settings: Mapping[str, Any] = self.summary["settings"]
        self.table = read_ledger(out)
        group = self.table["group"].fill_null(-1).to_numpy()
        numbers, first = np.unique(group, return_index=True)
        sizes = self.table["group_size"].fill_null(0).to_numpy()[first]
        several = np.flatnonzero((numbers >= 0) & (sizes > 1))
        self._group = group
        self.groups = numbers[several[np.lexsort((numbers[several], -sizes[several]))]]
        """Numbers of the groups of more than one sample, the largest first."""

    @property
    def pages(self) -> int:
        """Of groups, one at least."""
        return max(1, -(-len(self.groups) // PER_PAGE))

    def samples(self, rows: list[int]) -> list[dict[str, Any]]:
        """Ledger rows, each with what its ``reason`` means in ``label`` and ``means``."""
        found = some_rows(self.table, rows).to_pylist()
        for one in found:
            name = one["reason"] or ""
            one["label"], one["means"] = FILTERED if name.startswith("filter:") else REASONS.get(name, (name, ""))
        return found

    def page(self, number: int) -> list[list[dict[str, Any]]]:
        """The groups of a page, from 1; in each the kept samples, then the dropped, least similar first."""
        start = (min(max(number, 1), self.pages) - 1) * PER_PAGE
        return [self.group(int(one)) for one in self.groups[start : start + PER_PAGE]]

    def group(self, number: int) -> list[dict[str, Any]]:
        """Samples of a group, the first OF_A_GROUP: kept ones, then dropped ones, least similar first."""
        found = self.samples(np.flatnonzero(self._group == number)[:4096].tolist())
        found.sort(key=lambda one: (one["status"] != KEPT, one["image_similarity"] or 1.0, one["row"]))
        return found[:OF_A_GROUP]

    def by_text(self, text: str) -> list[dict[str, Any]]:
        """The samples whose captions are nearest to a text, nearest first, with their ``similarity``.

        Raises:
            UserError: the text is empty, or no sample has a caption.
        """
        if not text.strip():
            raise UsageError("there is nothing to search for: write some words")
        return self._found(SearchConfig(self.out, caption=text[:2000], k=FOUND))

    def by_image(self, file: str) -> list[dict[str, Any]]:
        """The samples whose images are nearest to that of a file, nearest first, with their ``similarity``.

        Raises:
            UserError: the image cannot be read, or is too large.
        """
        return self._found(SearchConfig(self.out, image=file, k=FOUND))

    def _found(self, config: SearchConfig) -> list[dict[str, Any]]:
        nearest = run_search(config)["nearest"]
        there = [(self.pictures.rows.get((one["shard"], one["key"])), one["similarity"]) for one in nearest]
        rows = [row for row, _ in there if row is not None]
        similar = [similarity for row, similarity in there if row is not None]
        return [one | {"similarity": s} for one, s in zip(self.samples(rows), similar, strict=True)]

    def why(self, row: int) -> dict[str, Any]:
        """What became of a sample and why.

        Returns:
            ``sample``; ``instead``, the kept sample that stands for it, if there is one here; ``lines``, the grounds in
            words.

        Raises:
            UsageError: there is no such row.
        """
        if not 0 <= row < self.table.num_rows:
            raise UsageError(f"there is no sample {row} in this set")
        (sample,) = self.samples([row])
        stand_in = self.pictures.rows.get((sample["kept_shard"] or "", sample["kept_key"] or ""))
        instead = None if stand_in is None or stand_in == row else self.samples([stand_in])[0]
        return {"sample": sample, "instead": instead, "lines": self._grounds(sample, instead)}

    def _grounds(self, sample: Mapping[str, Any], instead: Mapping[str, Any] | None) -> list[str]:
        if sample["status"] == KEPT:
            copies = (sample["group_size"] or 1) - 1
            if not copies:
                return ["Kept: nothing in the set is near it."]
            return [f"Kept: it stands for its group, which has {copies} more; see what was dropped for it."]
        if sample["status"] != DROPPED:
            return [f"Unreadable: {sample['reason']}"]
        lines = [f"{sample['label']}: {sample['means']}." if sample["means"] else f"Dropped: {sample['label']}."]
        if (similarity := sample["image_similarity"]) is not None:
            limit = self.settings["threshold"]
            lines.append(f"Images: a similarity of {similarity:.3f}; from {limit:g} on two are near.")
        if (similarity := sample["caption_similarity"]) is not None:
            limit = self.settings["caption_threshold"]
            lines.append(f"Captions: a similarity of {similarity:.3f}; from {limit:g} on two are near.")
        if instead is not None:
            lines.append(f"{instead['key']} stays in its place: {self._preferred(sample, instead)}")
        elif sample["kept_key"]:
            lines.append(f"{sample['kept_shard']} / {sample['kept_key']} stands for it, in another set.")
        return lines

    def _preferred(self, sample: Mapping[str, Any], instead: Mapping[str, Any]) -> str:
        """By which criterion the one that stays goes before, of those that the ledger tells."""
        pixels = [(one["width"] or 0) * (one["height"] or 0) for one in (instead, sample)]
        letters = [len(one["caption"] or "") for one in (instead, sample)]
        words = {"resolution": f"{pixels[0]:,} pixels beside {pixels[1]:,}", "lossless": "how it is compressed"}
        words["caption_length"] = f"{letters[0]} characters of caption beside {letters[1]}"
        order = [words.get(name, f"the number in {name[1:]}") for name in self.settings["prefer"]]
        return f"preferred by {', then '.join([*order, 'input order'])}."
