"""Oxford Flowers 102 in the true format of its archives."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules import Flowers102
from tests.official_archives import write_flowers102


def test_flowers_may_train_on_both_halves(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_flowers102(own_folder, monkeypatch)
    data = Flowers102(own_folder, train_on_val=True, val_share=0.5, image_size=32)
    data.prepare_data()
    data.setup("fit")
    assert len(data.splits["train"].labels) == len(data.splits["val"].labels) == 102
    assert Flowers102(train_on_val=True).expected_samples == 1836
    assert Flowers102().expected_samples == 1020
