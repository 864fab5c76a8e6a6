"""A small curated set with hostile captions, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.app.hostile import made_set


@pytest.fixture(scope="session")
def curated(emoji, tmp_path_factory) -> tuple[Path, str]:
    """``(curation, shards)``."""
    return made_set(emoji, tmp_path_factory.mktemp("app"))
