"""Flowers, pets and food, in the true format of their archives: read, planned for, and complained about."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from datamodules import Flowers102, Food101, OxfordPets
from tests.official_archives import write_flowers102, write_food101, write_oxford_pets

WRITERS = {Flowers102: write_flowers102, OxfordPets: write_oxford_pets, Food101: write_food101}


@pytest.mark.parametrize("kind", WRITERS)
def test_archives_are_unpacked_and_read(kind: type, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = WRITERS[kind](own_folder, monkeypatch)
    data = kind(own_folder, image_size=32, batch_size=4, num_workers=0, val_share=0.5)
    data.prepare_data()
    data.setup("fit")
    assert {name: len(part.labels) for name, part in data.splits.items() if name != "predict"} == counts
    assert len(data.class_names) == data.num_classes
    for split in ("train", "test"):
        images = data.splits[split]
        assert images.read(len(images.labels) - 1).size == (48, 40)
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 32, 32)
    assert max(Counter(data.splits["test"].labels.tolist())) == data.num_classes - 1


@pytest.mark.parametrize("kind", WRITERS)
def test_without_files_and_network(kind: type, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", unreachable)
    with pytest.raises(FileNotFoundError, match=r"is not in .* and cannot be downloaded \(.*set data.root to where"):
        kind(own_folder / "empty").prepare_data()
    assert kind(limit_per_class=3).expected_samples == 3 * kind(own_folder).num_classes


@pytest.mark.parametrize("kind", WRITERS)
def test_a_tree_that_was_half_unpacked(kind: type, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[kind](own_folder, monkeypatch)
    data = kind(own_folder, image_size=32)
    data.prepare_data()
    next(path for path in sorted(own_folder.rglob("*.jpg"), reverse=True)).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of \d+ files are missing, first .*jpg: remove .*unpacked again"):
        data.setup("fit")
