"""What benchmarks take from the quickstart: its settings, and which images its raw set repeats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

_COPY = re.compile(r"-copy\d+$")


def read_settings() -> dict[str, Any]:
    """The settings that the quickstart is shipped with."""
    path = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def original(key: str) -> str:
    """The key of the image that a planted copy is of; any other key as it is."""
    return _COPY.sub("", key)


def repeated_images(keys: Iterable[str]) -> set[str]:
    """Keys of the images that have planted copies among the keys of a raw set."""
    return {original(key) for key in keys if _COPY.search(key)}
