"""Food-101 in the true format of its archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules import Food101
from tests.official_archives import write_food101


def test_dishes_are_named_without_underscores(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_food101(own_folder, monkeypatch)
    data = Food101(own_folder, image_size=32, val_share=0.5)
    data.prepare_data()
    data.setup("fit")
    assert data.class_names == sorted(data.class_names) and len(data.class_names) == 101
    assert not any("_" in name for name in data.class_names)
    path = Path(data.sample_names("test")(0))
    assert path.parent.name.replace("_", " ") == data.class_names[int(data.splits["test"].labels[0])]


def test_the_training_size_is_known_before_the_download() -> None:
    assert Food101("nowhere").expected_samples == round(0.9 * 75_750)
    assert Food101("nowhere", fold=(0, 5)).expected_samples == round(0.8 * 75_750)
