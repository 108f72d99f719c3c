"""The curves of schedules, against their formulas."""

from __future__ import annotations

from recipes.parts.curves import first_step


def test_shares_mean_the_first_step_at_or_past_them() -> None:
    assert [first_step(at, 100) for at in (0, 0.29, 0.7, 0.705, 1, 99)] == [0, 29, 70, 71, 1, 99]
