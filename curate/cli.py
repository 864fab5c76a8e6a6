"""The verbs of ``afresh-curate``, which is ``python -m curate``, too."""

from __future__ import annotations

from collections.abc import Sequence

from afresh.commands import run
from afresh.configs import Verb

VERBS = {
    "import": Verb(
        "curate.config:ImportConfig",
        "curate.ingest:run_import",
        "turn a folder of images, a Hugging Face dataset or parquet files into tar shards",
        positionals=("src", "out"),
    ),
    "check": Verb(
        "curate.config:CheckConfig",
        "curate.check:run_check",
        "read every sample and list what is broken, without changing anything",
        positionals=("shards",),
    ),
    "dedup": Verb(
        "curate.config:DedupConfig",
        "curate.dedup:run_dedup",
        "drop copies: clean shards, a ledger of every sample, the training-set index, a report",
        positionals=("shards", "out"),
    ),
    "search": Verb(
        "curate.config:SearchConfig",
        "curate.search:run_search",
        "find the training samples nearest to an image or a caption",
        positionals=("out",),
    ),
    "report": Verb(
        "curate.config:ReportConfig",
        "curate.report:run_report",
        "write the report of a curation again",
        positionals=("out",),
    ),
    "export": Verb(
        "curate.config:ExportConfig",
        "curate.export:run_export",
        "hand on what a curation kept: as a Hugging Face dataset, parquet files, a trainer's folder, or a list of ids",
        positionals=("out", "dest"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 success, 1 failure, 2 bad usage."""
    return run("curate", "Curate a captioned image set: find its copies and keep one of each.", VERBS, argv)

