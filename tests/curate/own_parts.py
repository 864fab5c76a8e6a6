"""Parts of one's own as files, for tests that name them: in the working folder, and as an installed package's."""

from __future__ import annotations

from pathlib import Path

PARTS = '''
"""Steps of my own."""
import numpy as np


class Corners:
    dim, size, digest = 12, 8, "corners 1"

    def embed(self, images, batch_size=256):
        rows = [np.asarray(image.convert("RGB").resize((2, 2)), np.float32).ravel() + 1 for image in images]
        rows = np.array(rows, np.float32).reshape(-1, 12)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Letters:
    dim, digest = 26, "letters 1"

    def embed(self, captions):
        rows = np.array([[text.count(chr(97 + letter)) for letter in range(26)] for text in captions], np.float32)
        rows[:, 0] += 1e-3
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def exact_only(near, captions, order):
    """Only copies of equal pixels are dropped, for the preferred one."""
    stand_in, first = np.full(len(near.image_of), -1), {}
    for row in order.tolist():
        kept = first.setdefault(near.image_of[row], row)
        if kept != row:
            stand_in[row] = kept
    return stand_in


def has_no_e(sample):
    """Samples whose key has an e are left out."""
    return "e" not in sample.key


class InTurn:
    def __init__(self, workers):
        self.workers = workers

    def map(self, function, tasks, *, desc, unit="shards"):
        with open("engine.log", "a") as log:
            print(desc, len(tasks), file=log)
        return [function(task) for task in tasks]
'''
ENTRY_POINTS = """
[afresh.image_embedders]
corners = my_installed_parts:Corners

[afresh.caption_embedders]
letters = my_installed_parts:Letters

[afresh.decision_rules]
exact-only = my_installed_parts:exact_only

[afresh.filters]
no-e = my_installed_parts:has_no_e

[afresh.engines]
in-turn = my_installed_parts:InTurn
"""


def write_parts(folder: Path) -> None:
    """``my_parts.py`` in ``folder``."""
    (folder / "my_parts.py").write_text(PARTS)


def install_parts(folder: Path) -> str:
    """A package with entry points below ``folder``, as pip would leave it; the path that Python must search."""
    site = folder / "site"
    about = site / "my_installed_parts-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "my_installed_parts.py").write_text(PARTS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-installed-parts\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    return str(site)
