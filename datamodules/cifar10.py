"""CIFAR-10: 60,000 small photographs of ten kinds of things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchvision import datasets

from .files.official import download
from .images.base import ImageDataModule
from .images.sources import ImageArray, ImageSource


class CIFAR10(ImageDataModule):
    """CIFAR-10.

    Contents: 60,000 RGB photographs of 32 x 32 pixels, 6,000 of each of ten classes.
    Folder: `<root>/cifar-10-batches-py/` with `data_batch_1` to `data_batch_5`, `test_batch`, `batches.meta`.
    Splits: the official 10,000 test images; `val_share` of the 50,000 training images for validation.
    Licence: none stated; for research. Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html

    Args:
        root: Folder that holds `cifar-10-batches-py`; it is downloaded there (170 MB, checksummed) if absent.
        **kwargs: Those of `ImageDataModule`.
    """

    official_train_size = 50_000

    def __init__(self, root: str | Path = "data/cifar10", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()

    @property
    def class_names(self) -> list[str]:
        return ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def prepare_data(self) -> None:
        home = "https://www.cs.toronto.edu/~kriz/cifar.html"
        download(datasets.CIFAR10, self.root, self.root, f"cifar-10-python.tar.gz from {home}")

    def read_splits(self) -> dict[str, ImageSource]:
        """Read the pickled batches; torchvision checks their checksums first."""
        splits: dict[str, ImageSource] = {}
        for name in ("train", "test"):
            images = datasets.CIFAR10(str(self.root), train=name == "train")
            splits[name] = ImageArray(torch.from_numpy(images.data), torch.tensor(images.targets), f"cifar10/{name}")
        return splits
