"""A head on features that were computed once learns what it learns on images."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.vision import main
from tests.recipes.test_vision import PROBE, QUICK


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["none", "standard"])
def test_features_computed_once_train_the_same_head(augment: str) -> None:
    options = ["--trainer.max_epochs=3", *PROBE, f"--data.augment={augment}", "--test"]
    options.append("--trainer.precision=32-true")  # features are computed in it
    recomputed = main([*QUICK, *options])
    stored = main([*QUICK, *options, "--feature_views=3"])
    for key in ("test/accuracy", "test/loss", "test/f1", *(f"test/accuracy_of/{digit}" for digit in range(5, 10))):
        expected = float(recomputed.trainer.callback_metrics[key])
        assert float(stored.trainer.callback_metrics[key]) == pytest.approx(expected, abs=1e-5), key
    files = sorted(Path("runs/features").glob("*.f32"))
    times = [path.stat().st_mtime_ns for path in files]
    main([*QUICK, *options, "--feature_views=3"])
    assert [path.stat().st_mtime_ns for path in sorted(Path("runs/features").glob("*.f32"))] == times, "used again"
    main([*QUICK, *options, "--feature_views=3", "--data.seed=1"])
    assert len(list(Path("runs/features").glob("*.f32"))) > len(files), "another split has other features"
