"""The guided pipeline of a model: that of its family."""

from __future__ import annotations

from typing import Any

from train.denoising.families.registry import named, pipeline_family


def guided(pipe: Any, **overrides: Any) -> Any:
    """A pipeline of the same parts whose prediction guidance terms may correct.

    Args:
        pipe: of a known family.
        overrides: components to take instead, as in ``scheduler=…``.

    Raises:
        UserError: it is of no family that is known.
    """
    return named(pipeline_family(pipe).guided).from_pipe(pipe, **overrides)
