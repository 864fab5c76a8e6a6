"""Files of neurons, as ``train localize`` writes them or somebody by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from afresh.errors import UserError


def read_neurons(path: str | Path) -> tuple[dict[str, list[int]], dict[str, dict[str, list[int]]]]:
    """The neurons in a file of ``train localize``, or in one made by hand.

    The latter is ``{"neurons": {"<name of an attn2.to_v>": [units]}}``.

    Returns:
        All of them together, and each caption's own, which a file by hand need not have.

    Raises:
        UserError: the file is missing, or holds no neurons.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train localize writes one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        if content.get("unfinished"):
            raise UserError(f"{path}: train localize was stopped; run it again, it goes on")
        own = {row["caption"]: _checked(row["neurons"]) for row in content.get("prompts", ())}
        return _checked(content["neurons"]), own
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: not a file of neurons, as train localize writes it") from None


def _checked(neurons: Any) -> dict[str, list[int]]:
    return {str(name): [int(unit) for unit in units] for name, units in neurons.items()}

