"""``train verdicts``: the samples that a run's filter left out again and again, as a list that excludes them for good.

    afresh-train verdicts RUN always.tsv
    afresh-curate dedup SHARDS OUT --exclude always.tsv        or: afresh-train finetune --exclude always.tsv …

The list names the shards that were trained on, so ``SHARDS`` are those, not the ones that they were curated from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from afresh.errors import UsageError, UserError
from curate.decisions.sample_lists import write_ids
from train.finetune.filter.config import VerdictsConfig


def run_verdicts(config: VerdictsConfig) -> dict[str, Any]:
    """Write the list, and return how many samples there were, were judged often enough, and are listed.

    Raises:
        UsageError: a setting is out of range.
        UserError: the run has no verdicts, or judged nothing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if config.min_judged < 1:
        raise UsageError(f"min_judged must be at least 1, not {config.min_judged}")
    if not 0 < config.min_share <= 1:
        raise UsageError(f"min_share must lie in (0, 1], not {config.min_share}")
    path = Path(config.run) / "verdicts.parquet"
    if not path.is_file():
        raise UserError(f"{path}: there are no verdicts; is {config.run} the folder of a finished `train finetune`?")
    try:
        table = pq.read_table(path, columns=["shard", "key", "judged", "reached"])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a table of verdicts: {error}") from error
    judged, reached = table["judged"].to_numpy(), table["reached"].to_numpy()
    if not judged.any():
        raise UserError(f"{path}: nothing was judged: the run had no filter, or ended before it acted")
    listed = np.flatnonzero((judged >= config.min_judged) & (reached >= config.min_share * judged))
    chosen = table.take(listed)
    write_ids(config.out, zip(chosen["shard"].to_pylist(), chosen["key"].to_pylist(), strict=True))
    return {
        "samples": table.num_rows,
        "judged_often_enough": int((judged >= config.min_judged).sum()),
        "listed": len(listed),
        "out": config.out,
    }

