"""CIFAR-10 in its true format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datamodules import CIFAR10


def test_missing_cifar10_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz"):
        CIFAR10(tmp_path / "nowhere").prepare_data()


def test_the_official_split_is_read(cifar10: Path) -> None:
    data = CIFAR10(cifar10, image_size=32, val_share=0.25)
    data.setup("fit")
    assert {name: len(part.labels) for name, part in data.splits.items()} == {
        "train": 150, "val": 50, "test": 40, "predict": 40,
    }  # fmt: skip
    assert data.splits["test"].name(3) == "cifar10/test/3"
    assert CIFAR10("nowhere").expected_samples == 45_000
