"""Whole batches of images: augmented as by torchvision, and what stands for what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

from datamodules import ImageFolder
from datamodules.images.batches import sample_transform
from tests.conftest import picture, write_folder
from tests.datamodules.conftest import batches_of, truncate


def test_the_standard_augmentation_is_torchvisions() -> None:
    steps = [v2.PILToTensor(), v2.RandomResizedCrop(64, scale=(0.35, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    theirs, ours = v2.Compose(steps), sample_transform("standard", 64, train=True)
    mirrored = []
    for seed in range(20):
        made = picture(seed, 90 + seed, 120)
        torch.manual_seed(seed)
        expected = theirs(made)
        torch.manual_seed(seed)
        found = ours(made)
        assert torch.equal(found, expected)
        mirrored.append(float(torch.rand(())))
    assert len(set(mirrored)) == 20, "as many random numbers were drawn"


def test_a_batch_of_nothing_readable_is_an_error(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "f", splits=("train", "val", "test"), classes=2, each=2)
    for path in root.glob("train/*/*.jpg"):
        truncate(path)
    data = ImageFolder(root, image_size=100, batch_size=4, num_workers=0, on_error="skip")
    data.setup("fit")
    with pytest.raises(ValueError, match="no image of a batch of 4 can be read"):
        batches_of(data, "train")
