"""The report is written again from what a finished curation left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from afresh.errors import UserError
from curate.config import ReportConfig
from curate.report import run_report
from tests.curate.made_mess import promised


def test_the_report_is_written_again_from_what_is_there(curated, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(curated[0], out)
    (out / "report.html").unlink()
    run_report(ReportConfig(out=str(out)))
    assert promised(out) == promised(curated[0])


@pytest.mark.parametrize("missing", ["summary.json", "ledger.parquet", "work/report.json"])
def test_a_report_of_an_unfinished_curation_is_refused_by_name(curated, tmp_path, missing):
    out = tmp_path / "out"
    shutil.copytree(curated[0], out)
    (out / missing).unlink()
    with pytest.raises(UserError, match=Path(missing).name):
        run_report(ReportConfig(out=str(out)))
