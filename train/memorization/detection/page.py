"""What ``train detect`` found, on one page: how well scores tell labels apart, the charts, the highest prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from afresh.pages import facts, picture, write_page
from train.memorization.scoring import Scores
from train.prompts import Prompt

TEMPLATE = Path(__file__).with_name("scores.html.jinja")
HIGHEST = 50
LABELS = {1: "memorized", 0: "not memorized", None: ""}


def write_scores_page(
    path: Path, model: str, prompts: Sequence[Prompt], scores: Scores, summary: Mapping[str, Any]
) -> None:
    """Write the page.

    Args:
        path: of it.
        model: that was looked at.
        prompts: with their labels.
        scores: of the prompts.
        summary: of the job, with the paths of its charts.
    """
    from PIL import Image

    values = scores.of_prompt
    order = np.argsort(-next(iter(values.values())), kind="stable")[:HIGHEST]
    charts = []
    for name in ("chart", "trajectories"):
        if name in summary:
            with Image.open(summary[name]) as image:
                charts.append((picture(image, largest=max(image.size)), f"{name} of the scores"))
    write_page(
        path,
        TEMPLATE,
        name=path.stem,
        model=model,
        facts=facts({name: value for name, value in summary.items() if name not in ("chart", "trajectories", "page")}),
        separation=[(name, auc, summary["tpr_at_1pct_fpr"][name]) for name, auc in summary.get("auc", {}).items()],
        charts=charts,
        signals=list(values),
        highest=[
            {
                "scores": [float(column[row]) for column in values.values()],
                "label": LABELS[prompts[row].label],
                "caption": prompts[row].caption,
            }
            for row in order
        ],
    )
