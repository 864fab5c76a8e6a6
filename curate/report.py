"""``curate report``: the report of a finished curation, again."""

from __future__ import annotations

from typing import Any

from afresh.storage import Store
from curate.config import ReportConfig
from curate.results.ledger import read_ledger
from curate.results.report_data import Pictures
from curate.results.report_page import LEDGER_COLUMNS, read_summary, render, write_report


def run_report(config: ReportConfig) -> dict[str, Any]:
    """Write ``out/report.html`` again from what ``out`` holds.

    Raises:
        UsageError: ``out`` is a URL that cannot be opened.
        UserError: ``out`` is not a finished curation.
    """
    out = Store(config.out)
    summary = read_summary(config.out)
    html = render(summary, read_ledger(config.out, LEDGER_COLUMNS), Pictures.load(out))
    write_report(out, html)
    return {"report": out.at("report.html"), "bytes": len(html.encode())}

