"""Summaries as text."""

from __future__ import annotations

import json

from afresh import summaries


def test_rows_of_a_summary_become_a_table():
    text = summaries.format_summary(
        {"rows": [{"model": "raw", "share": 0.61239}, {"model": "curated", "share": 0}]}
    )
    assert text.splitlines() == ["model     share", "raw      0.6124", "curated       0"]


def test_json_says_the_same_without_what_steers_a_terminal():
    summary = {"key": "\x1b[2J \u202e \x9b \ud800 é", "\u2066": [1]}
    text = summaries.as_json(summary)
    assert json.loads(text) == summary and text.isprintable() and "é" in text
