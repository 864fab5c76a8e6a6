"""Summaries as text."""

from __future__ import annotations

from afresh import summaries


def test_rows_of_a_summary_become_a_table():
    text = summaries.format_summary(
        {"rows": [{"model": "raw", "share": 0.61239}, {"model": "curated", "share": 0}]}
    )
    assert text.splitlines() == ["model     share", "raw      0.6124", "curated       0"]
