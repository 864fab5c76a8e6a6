"""The audit's curves: what a short search found is drawn too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from train.evaluation.reporting.audit_report import draw_curves
from train.memorization.auditing import Audit


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_the_panel_of_the_diffusion_loss_shows_a_search_of_any_length(tmp_path, steps):
    points = np.array([0, steps])
    measures = {name: np.zeros((2, 1, 1, 1), np.float32) for name in ("similarity", "pixel_correlation")}
    loss = np.linspace(1.0, 0.5, steps, dtype=np.float32).reshape(1, 1, steps)
    found = Audit(points, measures, loss, torch.zeros(1, 1, 1, 1), [], [])
    draw_curves(tmp_path / "curves.png", {"training": found})
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    panel = pixels[:, pixels.shape[1] * 2 // 3 :]
    drawn = (np.abs(panel - [0xD1, 0x49, 0x5B]).sum(2) < 30).sum()  # in the colour of the training images
    assert drawn > 20
