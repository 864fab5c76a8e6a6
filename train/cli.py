"""The verbs of ``afresh-train``, which is ``python -m train``, too."""

from __future__ import annotations

import os
from collections.abc import Sequence

from afresh.commands import run
from afresh.configs import Verb

VERBS = {
    "quickstart": Verb(
        "train.quickstart.config:QuickstartConfig",
        "train.quickstart.job:run_quickstart",
        "curate, fine-tune, sample and evaluate on the carried sample set, in minutes",
    ),
    "finetune": Verb(
        "train.finetune.config:FinetuneConfig",
        "train.finetune.loop:run_finetune",
        "fine-tune a Stable Diffusion's UNet, with or without the memorization filter",
        check="train.finetune.checks:check_finetune",
    ),
    "verdicts": Verb(
        "train.finetune.filter.config:VerdictsConfig",
        "train.finetune.filter.verdicts:run_verdicts",
        "list the samples that a run's filter left out again and again, to exclude them for good",
        positionals=("run", "out"),
    ),
    "sample": Verb(
        "train.sampling.config:SampleConfig",
        "train.sampling.job.job:run_sample",
        "draw images for a file of prompts, with any guidance",
        check="train.sampling.job.checks:check_sample",
    ),
    "detect": Verb(
        "train.memorization.config:DetectConfig",
        "train.memorization.detection.job:run_detect",
        "score prompts by how strongly the model has memorized them",
        check="train.memorization.checks:check_detect",
    ),
    "localize": Verb(
        "train.evaluation.config:LocalizeConfig",
        "train.evaluation.localize:run_localize",
        "find the neurons behind memorized prompts, and show what blocking them does",
        check="train.evaluation.checks:check_localize",
    ),
    "explain": Verb(
        "train.memorization.config:ExplainConfig",
        "train.memorization.explaining.job:run_explain",
        "say which words of a prompt its memorization hangs on, and what to change first",
        check="train.memorization.checks:check_explain",
    ),
    "audit": Verb(
        "train.evaluation.config:AuditConfig",
        "train.evaluation.audit:run_audit",
        "try to bring training images back from a mitigated model, beside images that it never saw",
        check="train.evaluation.checks:check_audit",
    ),
    "evaluate": Verb(
        "train.evaluation.config:EvaluateConfig",
        "train.evaluation.evaluate:run_evaluate",
        "compare models and guidances: copies, alignment, quality, time",
        check="train.evaluation.checks:check_evaluate",
    ),
    "check": Verb(
        "train.machine.config:CheckConfig",
        "train.machine.job:run_check",
        "try what this machine can do, compare it with the CPU's result, and say what to put into a config",
    ),
    "app": Verb(
        "train.app.config:AppConfig",
        "train.app.job:run_app",
        "open a page over a model, a curation and a folder of runs",
        check="train.app.checks:check_app",
    ),
    "reports": Verb(
        "train.evaluation.config:ReportsConfig",
        "train.evaluation.reporting.index:run_reports",
        "write one page that links every report below a folder",
        positionals=("folder",),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 success, 1 failure, 2 bad usage."""
    # transformers warns at import of every optional package that is missing; none of it is for the user to act on.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return run("train", "Fine-tune Stable Diffusion, sample and measure, without memorization.", VERBS, argv)

