"""Settings of ``train check``. A plain dataclass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CheckConfig:
    """Try what this machine can do, compare it with the CPU's result, and say what to put into a config.

    Args:
        gpu: the check of a machine with a GPU: without one it fails, and sizes are those of real work.
        model: Stable Diffusion to take a step of and to draw with; empty for the carried sample model.
        folder: where the disk's speed is measured; empty for the system's folder of temporary files.
        out: file for the findings, as a page of Markdown; empty for none.
        device: auto, cpu, cuda, …
    """

    gpu: bool = False
    model: str = ""
    folder: str = ""
    out: str = ""
    device: str = "auto"
