"""A plan says groups, learning rates and steps, and refuses what cannot work."""

from __future__ import annotations

import pytest

from recipes.__main__ import main
from tests.recipes.cli.test_catalogue import output


def test_plan_shows_groups_rates_and_steps(capsys: pytest.CaptureFixture[str]) -> None:
    screen = output(capsys, "plan", "vision/quickstart")
    assert "573 training samples (counted)" in screen and "17 optimiser steps per epoch, 204 in all" in screen
    rows = {line.split()[0]: line.split() for line in screen.splitlines() if line.split()}
    assert rows["head"][-2] == "0.00976", "the head's rate at the end of the warm-up, when the cosine has begun to fall"
    assert float(rows["layer3"][-2]) == pytest.approx(0.00976 * 0.7, rel=1e-3)
    assert float(rows["stem"][-2]) == pytest.approx(0.00976 * 0.7**4, rel=1e-2)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data.batch_size=1000", "don't fill one batch"),
        ("--model.schedule.warmup=1.5", "a share of the run below 1"),
        ("--model.schedule.warmup=0.1", "LRWarmup and the warm-up of"),
        ("--model.lr_multipliers={heed: 2}", "heed"),
        ("--model.backbone=resnet5", "did you mean 'resnet50'?"),
    ],
)
def test_plan_refuses_what_cannot_work(option: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "vision/quickstart", option])
    assert words in capsys.readouterr().err
