"""The benchmark of the join by tasks: the costs that it is measured by give back what was measured."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import scale_join


def test_costs_of_two_kinds_of_operations_are_told_apart(monkeypatch):
    true = {name: tuple(1e-6 / (kind + 1) for kind in range(len(numbers))) for name, numbers in
            scale_join.operations(500_000).items()}  # fmt: skip

    def measured(n: int, dim: int, wider: int = 1) -> dict[str, float]:
        count = scale_join.operations(n, wider)
        took = {name: float(np.dot(true[name], numbers)) for name, numbers in count.items()}
        return took | {"pairs": count["comparing"][1]}

    monkeypatch.setattr(scale_join, "measured", measured)
    unit = scale_join.unit_costs(500_000, 64)
    assert all(unit[name] == pytest.approx(costs) for name, costs in true.items())
    assert scale_join.predicted(500_000, unit) == pytest.approx(
        {name: seconds for name, seconds in measured(500_000, 64).items() if name != "pairs"}
    )


def test_every_stage_of_a_small_run_is_measured(capsys):
    took = scale_join.measured(20_000, 16)
    assert {"centroids", "assigning", "comparing", "merging", "recall", "deciding", "pairs", "peak"} == took.keys()
    assert all(seconds > 0 for seconds in took.values())
    assert "20,000 × 16: 19 cells" in capsys.readouterr().out
