"""``train reports``: one page that links every report below a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from afresh.errors import UsageError
from afresh.pages import write_index
from train.evaluation.config import ReportsConfig


def run_reports(config: ReportsConfig) -> dict[str, Any]:
    """Write ``folder/index.html``; the number of ``pages`` and the ``index``.

    Raises:
        UsageError: there is no such folder.
    """
    folder = Path(config.folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    return {"pages": len(write_index(folder)), "index": str(folder / "index.html")}
