"""The filter's threshold from magnitudes of unique samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from afresh.errors import UserError
from curate.config import DedupConfig
from curate.dedup import run_dedup
from curate.reading.samples import read_samples
from curate.reading.writing import write_shard
from curate.sample_set import load_part
from train.finetune.filter.calibration import ENOUGH, MagnitudeQuantiles, unique_samples
from train.memorization.thresholds import BANDS


def filled(quantiles: MagnitudeQuantiles, draws: dict[int, np.ndarray]) -> torch.Tensor:
    for band, values in draws.items():
        quantiles.add(torch.full((len(values),), band), torch.from_numpy(values))
    return quantiles.thresholds()


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_thresholds_are_the_quantiles_of_each_band_or_of_all(quantile):
    rng = np.random.default_rng(0)
    draws = {band: rng.lognormal(mean=band / 5, sigma=0.4, size=5000) for band in range(BANDS)}
    expected = [np.quantile(draws[band], quantile) for band in range(BANDS)]
    assert filled(MagnitudeQuantiles(quantile, True, 0), draws).tolist() == pytest.approx(expected, rel=0.02)
    together = np.quantile(np.concatenate([*draws.values()]), quantile)
    assert filled(MagnitudeQuantiles(quantile, False, 0), draws).tolist() == pytest.approx([together] * BANDS, rel=0.02)


def test_a_band_with_too_few_magnitudes_has_no_threshold():
    values = np.linspace(1, 2, ENOUGH)
    thresholds = filled(MagnitudeQuantiles(0.99, True, 0), {3: values, 4: values[1:]})
    assert thresholds.isfinite().tolist() == [band == 3 for band in range(BANDS)]
    assert thresholds[3] == pytest.approx(2, rel=0.02)  # fewer than 1/(1 − 0.99): by the largest
    assert filled(MagnitudeQuantiles(0.99, False, 0), {3: values}).isfinite().all()


def test_shares_below_are_the_inverse_of_quantiles():
    rng = np.random.default_rng(2)
    quantiles = MagnitudeQuantiles(0.9, True, 0)
    filled(quantiles, {2: rng.lognormal(size=5000), 3: rng.lognormal(mean=1, size=5000), 4: np.ones(ENOUGH - 1)})
    bands, shares = torch.tensor([2, 2, 3, 3]), torch.tensor([0.1, 0.77, 0.5, 0.99], dtype=torch.float64)
    found = quantiles.shares_below(bands, quantiles.at(bands, shares))
    assert found.tolist() == pytest.approx(shares.tolist(), abs=1e-3)
    assert quantiles.shares_below(torch.tensor([4]), torch.tensor([1.0])).isnan().all()
    assert quantiles.at(torch.tensor([4]), torch.tensor([0.5], dtype=torch.float64)).isinf().all()


def test_a_fading_window_follows_magnitudes_that_grow_and_a_fixed_one_does_not():
    rng = np.random.default_rng(1)
    fading, fixed = MagnitudeQuantiles(0.9, False, 50), MagnitudeQuantiles(0.9, False, 0)
    for step in range(600):
        values = torch.from_numpy(rng.uniform(0, 1, 16) * (1 + step / 200))
        for quantiles in (fading, fixed):
            quantiles.add(torch.zeros(16, dtype=torch.int64), values)
    now = 0.9 * (1 + 550 / 200)  # the window's mean age is 50 steps
    assert fading.thresholds()[0] == pytest.approx(now, rel=0.07)
    assert fixed.thresholds()[0] < 0.8 * now
    assert fading.sizes()[0] == pytest.approx(16 * 50, rel=0.02)


def test_magnitudes_out_of_scale_are_counted_at_its_ends():
    thresholds = filled(MagnitudeQuantiles(0.5, True, 0), {0: np.zeros(ENOUGH), 1: np.full(ENOUGH, 1e9)})
    assert thresholds[0] < 2e-4 and thresholds[1] > 9e3


def test_a_curations_ledger_tells_which_samples_are_unique(tmp_path):
    samples = load_part("finetune")[:8]
    raw = [(s.key, dict(s.members)) for s in samples]
    write_shard(tmp_path / "raw" / "0.tar", raw[:5])
    write_shard(tmp_path / "raw" / "1.tar", [*raw[5:], (f"{raw[0][0]}-copy", raw[0][1])])
    run_dedup(DedupConfig(shards=[str(tmp_path / "raw")], out=str(tmp_path / "out"), workers=1))
    urls = [str(tmp_path / "raw" / name) for name in ("0.tar", "1.tar")]
    ids = [(sample.shard, sample.key) for url in urls for sample in read_samples(url)]
    unique = unique_samples(str(tmp_path / "out"), urls, ids)
    assert [key for (_, key), one in zip(ids, unique, strict=True) if one] == [s.key for s in samples[1:]]
    with pytest.raises(UserError, match="the curation of the shards that are trained on"):
        unique_samples(str(tmp_path / "out"), ["/data/2.tar"], [("2.tar", "x")])
