"""How well scores tell memorized prompts from others, by label and by what the model draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from afresh.errors import UserError
from train.memorization.config import MEMORIZED
from train.memorization.detection.roc import bootstrap_interval, roc_auc, tpr_at_fpr
from train.memorization.scoring import Scores
from train.memorization.thresholds import threshold_at_fpr
from train.prompts import Prompt


def labels_of(prompts: Sequence[Prompt]) -> NDArray[np.int64]:
    """``[n]``: 1 memorized, 0 not, -1 unknown."""
    return np.array([-1 if prompt.label is None else prompt.label for prompt in prompts])


def read_outcomes(path: str | Path, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    """``[prompts]``: the highest similarity to a training image among the images drawn for each prompt.

    Args:
        path: folder of ``train sample --index``, or its ``samples.parquet``.
        prompts: what is asked for, found by caption.

    Raises:
        UserError: there is no such table, it was written without an index, or it lacks a prompt.
    """
    import pyarrow.parquet as parquet

    path = Path(path)
    table = path / "samples.parquet" if path.is_dir() else path
    if not table.is_file():
        raise UserError(f"{table}: missing; train sample --index writes it")
    highest: dict[str, float] = {}
    for row in parquet.read_table(table, columns=["prompt", "similarity"]).to_pylist():
        if row["similarity"] is None:
            raise UserError(f"{table}: holds no similarities; draw with train sample --index")
        highest[row["prompt"]] = max(row["similarity"], highest.get(row["prompt"], -1.0))
    missing = [prompt.caption for prompt in prompts if prompt.caption not in highest]
    if missing:
        raise UserError(f"{table}: no image of {missing[0]!r}; draw every prompt of the file")
    return np.array([highest[prompt.caption] for prompt in prompts], np.float32)


def summarise(
    prompts: Sequence[Prompt],
    scores: Scores,
    outcomes: NDArray[np.float32] | None = None,
    *,
    bootstrap: int = 1000,
    known: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Counts, the prompts that score highest by any signal, what is high, and how well each signal separates: with
    labels of both kinds by label, and with outcomes by outcome, in ``by_outcome``.

    ``high`` has of each signal the ``threshold``, by what it was ``found``, and how many ``prompts`` reach it: that of
    ``known`` (signal → the model's calibrated threshold), or else the one that 1 % of the prompts of label 0 reach. Of
    a signal without either it says what to do.

    The two differ where a caption that was never trained on is near enough to a memorized one to draw its image
    (labelled 0, memorized in outcome), or a repeated caption draws something else. ``less_contradicted`` goes by
    label, without the prompts of label 0 that draw a copy.
    """
    labels, values = labels_of(prompts), scores.of_prompt
    summary: dict[str, Any] = {
        "prompts": len(prompts),
        "seeds": scores.seeds.shape[1],
        "steps": len(scores.timesteps),
        "timesteps": scores.timesteps.tolist(),
        "signals": list(values),
        "evaluations": scores.evaluations,
        **separation(values, labels, bootstrap=bootstrap),
    }
    if outcomes is not None:
        drawn = (outcomes > MEMORIZED).astype(np.int64)
        contradicted = (labels == 0) & (drawn == 1)
        summary["by_outcome"] = separation(values, drawn, bootstrap=bootstrap) | {
            "label_0_memorized": int(contradicted.sum()),
            "label_1_not_memorized": int(((labels == 1) & (drawn == 0)).sum()),
        }
        # 0 says that a prompt is known not to be memorized, which one that draws a copy is not.
        summary["less_contradicted"] = separation(values, np.where(contradicted, -1, labels), bootstrap=bootstrap)
    summary["high"] = {name: high_of(column, labels, (known or {}).get(name)) for name, column in values.items()}
    highest = [row for column in values.values() for row in np.argsort(-column, kind="stable")[:5].tolist()]
    summary["highest"] = [
        {name: float(column[row]) for name, column in values.items()}
        | {"label": prompts[row].label, "caption": prompts[row].caption}
        for row in dict.fromkeys(highest)
    ]
    return summary


def high_of(values: NDArray[np.float32], labels: NDArray[np.int64], known: float | None = None) -> Any:
    """What is high of one signal; see :func:`summarise`."""
    if known is None and not (labels == 0).any():
        return "not known: add prompts of label 0 (negatives), or calibrate the model's magnitude (calibrate)"
    threshold = threshold_at_fpr(values[labels == 0], 0.01) if known is None else known
    found = "1 % of the prompts of label 0 reach it, at most" if known is None else "the model's calibrated threshold"
    return {"threshold": threshold, "found": found, "prompts": int((values >= threshold).sum())}


def separation(
    values: Mapping[str, NDArray[np.float32]], labels: NDArray[np.int64], *, bootstrap: int = 1000
) -> dict[str, Any]:
    """How well signals tell 1 from 0; empty unless both occur.

    Args:
        values: signal → ``[n]``, higher = more likely memorized.
        labels: ``[n]``, 1 memorized, 0 not, -1 unknown (left out).
        bootstrap: resamples behind the 95 % intervals; 0 leaves them out.

    Returns:
        ``memorized`` and ``not_memorized`` (counts); by signal ``auc``, ``tpr_at_1pct_fpr`` (strict), and their
        ``…_interval``.
    """
    known = labels >= 0
    if not {0, 1} <= set(labels.tolist()):
        return {}
    result: dict[str, Any] = {"memorized": int((labels == 1).sum()), "not_memorized": int((labels == 0).sum())}
    for key, statistic in (("auc", roc_auc), ("tpr_at_1pct_fpr", tpr_at_fpr)):
        result[key] = {name: statistic(column[known], labels[known]) for name, column in values.items()}
        result[f"{key}_interval"] = {
            name: bootstrap_interval(statistic, column[known], labels[known], samples=bootstrap)
            for name, column in values.items()
            if bootstrap
        }
    return result

