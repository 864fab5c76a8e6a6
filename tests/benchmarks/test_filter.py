"""benchmarks.filter: a policy's drops over magnitudes that are known are the filter's own."""

from __future__ import annotations

import torch

from benchmarks.filter import POLICIES, replay
from train.memorization.thresholds import BANDS, Thresholds


def test_every_policy_is_replayed_and_the_papers_leaves_out_what_is_above_its_bands_threshold():
    n, samples = 320, 40
    draw = torch.Generator().manual_seed(0)
    visits = {
        "rows": torch.arange(n) % samples,
        "t": torch.randint(0, 1000, (n,), generator=draw),
        "m": torch.rand(n, generator=draw),
        "captioned": torch.rand(n, generator=draw) > 0.1,
        "texts": [f"caption {row}" for row in range(samples)],
        "repeated": torch.arange(samples) < 20,
    }
    limits = torch.linspace(0.1, 0.9, BANDS)
    thresholds = Thresholds.of(limits.tolist(), "l2")
    left_out = {name: replay(visits, settings, thresholds, 0.8) for name, settings in POLICIES.items()}
    above = visits["captioned"] & (visits["m"] > limits[visits["t"] // (1000 // BANDS)])
    assert torch.equal(left_out["every_step"], above) and 0 < above.sum() < n
    assert all(one.shape == (n,) for one in left_out.values())
    assert not torch.equal(left_out["noisy_caption"], above)
