"""Intervals are SciPy's, and cover what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from callbacks.report.intervals import bca, bootstrap, mean_with_interval, wilson, within_bounds


@pytest.mark.parametrize("size", [30, 200, 2000])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_interval_of_a_share_covers_what_it_says(size: int, share: float) -> None:
    ends = np.array([wilson(right, size) for right in range(size + 1)])
    assert (np.diff(ends, axis=0) > 0).all() and ends.min() >= 0 and ends.max() <= 1
    drawn = np.random.default_rng(0).binomial(size, share, 20_000)
    simulated = ((ends[drawn, 0] <= share) & (share <= ends[drawn, 1])).mean()
    inside = (ends[:, 0] <= share) & (share <= ends[:, 1])
    exact = stats.binom.pmf(np.arange(size + 1), size, share)[inside].sum()
    assert simulated == pytest.approx(exact, abs=0.006)
    # of 30 at 0.9 no whole number of right answers gives less than 0.9742 above 0.9318
    assert 0.93 <= exact <= (0.9743 if (size, share) == (30, 0.9) else 0.97)


def test_the_interval_of_a_mean_is_scipys() -> None:
    values = torch.rand(80, generator=torch.Generator().manual_seed(0)).double() ** 3  # a lopsided one
    found, rng = mean_with_interval(values), np.random.default_rng(0)
    expected = stats.bootstrap((values.numpy(),), np.mean, method="BCa", n_resamples=4000, rng=rng).confidence_interval
    assert found["value"] == pytest.approx(values.mean().item())
    assert found["interval"] == pytest.approx(tuple(expected), abs=0.015)


def test_draws_are_seeded_and_bounded_in_memory() -> None:
    rows: list[int] = []

    def statistic(drawn: torch.Tensor) -> torch.Tensor:
        rows.append(drawn.numel())
        return drawn.double().mean(1)

    one, other = (bootstrap(statistic, 20_000, draws=120, seed=3) for _ in range(2))
    assert torch.equal(one, other) and not torch.equal(one, bootstrap(statistic, 20_000, draws=120, seed=4))
    assert len(one) == 120 and max(rows) <= 1_000_000


def test_without_any_influence_there_is_no_interval_and_wilsons_ends_replace_0_and_1() -> None:
    drawn = torch.tensor([0.96] * 500 + [1.0] * 500, dtype=torch.double)
    assert bca(drawn, 1.0, torch.zeros(50)) is None
    influence = torch.tensor([-0.1] + [0.1 / 49] * 49)
    low, high = within_bounds(drawn, 0.98, influence) or (0, 0)
    assert low == pytest.approx(0.96) and 0.98 < high < 1
