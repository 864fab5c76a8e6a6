"""``train check``: all probes, one after the other, and what follows from them for a config."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from afresh.cores import cpu_count
from afresh.errors import UserError
from afresh.files import write_atomic
from afresh.progress import get_logger
from train.machine.config import CheckConfig
from train.machine.findings import WORKS, Finding, Findings

log = get_logger(__name__)
PAYS = 0.9
"""Of the time that the plain way takes: what is not faster than that is not worth its setting."""


def run_check(config: CheckConfig) -> Findings:
    """Try what this machine can do.

    Returns:
        ``findings`` (rows ``part, what, result, detail, seconds``) and ``config``, settings of ``train finetune``; the
        exit code is 1 where something fails or differs from the CPU's result.

    Raises:
        UserError: a GPU is to be checked, and torch sees none.
        UsageError: torch cannot put anything on ``device``.
    """
    import torch

    from train.denoising.opening.files import check_device
    from train.denoising.opening.loading import chosen_device

    if config.gpu and not torch.cuda.is_available():
        raise UserError(f"gpu: torch {torch.__version__} sees no GPU here; `nvidia-smi` tells whether the driver does")
    name = chosen_device("cuda" if config.gpu and config.device == "auto" else config.device)
    check_device(name)
    device = torch.device(name)
    findings = []
    for finding in _probed(config, device):
        log.info("%s: %s: %s", finding.part, finding.what, finding.result)
        findings.append(finding)
    found = Findings(findings, advice(findings, device.type))
    if config.out:
        with write_atomic(Path(config.out)) as temporary:
            temporary.write_text(found.markdown(), encoding="utf-8")
    return found


def _probed(config: CheckConfig, device: Any) -> Iterator[Finding]:
    from train.denoising.opening.loading import sample_model_dir
    from train.machine import facts, probes

    model = config.model or str(sample_model_dir())
    yield from facts.versions()
    yield from facts.devices()
    yield from facts.disk(config.folder)
    yield from facts.processes()
    yield from probes.attention(device, config.gpu)
    yield from probes.drawing(model, device)
    yield from probes.training(model, device, config.gpu)


def advice(findings: Sequence[Finding], device: str) -> dict[str, Any]:
    """Settings of ``train finetune`` that the findings speak for.

    Args:
        findings: of all probes.
        device: ``cpu``, ``cuda``, …
    """
    seconds = {
        (one.part, one.what): one.seconds for one in findings if one.result == WORKS and one.seconds is not None
    }
    steps = {what: taken for (part, what), taken in seconds.items() if part == "training step"}
    plain = steps.pop("no", math.inf)
    compiled = steps.pop("compiled", math.inf)
    half = min(steps, key=steps.__getitem__, default="no")
    settings: dict[str, Any] = {"mixed_precision": half if steps.get(half, math.inf) < PAYS * plain else "no"}
    dtype = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[settings["mixed_precision"]]
    kernels = {what: taken for (part, what), taken in seconds.items() if part == "attention" and what.endswith(dtype)}
    xformers = kernels.pop(f"xformers, {dtype}", math.inf)
    settings["attention"] = "xformers" if xformers < PAYS * min(kernels.values(), default=math.inf) else "auto"
    settings["compile"] = compiled < PAYS * plain
    settings["workers"] = max(1, min(8, cpu_count() - 1)) if device != "cpu" else 1
    return settings
