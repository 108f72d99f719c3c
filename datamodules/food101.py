"""Food-101: 101,000 photographs of dishes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torchvision import datasets

from .files.official import download, read_official
from .images.base import ImageDataModule
from .images.sources import ImageSource


class Food101(ImageDataModule):
    """Food-101.

    Contents: 101,000 RGB photographs of at most 512 pixels, 101 dishes, 1,000 of each. The training labels are not
    all right, on purpose.
    Folder: `<root>/food-101/` with `images/<dish>/*.jpg`, `meta/train.json` and `meta/test.json`.
    Splits: the official 25,250 for the test; `val_share` of the 75,750 others for validation.
    Licence: none stated; for research. Source: Bossard et al. 2014,
    https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/

    Args:
        root: Folder that holds `food-101`; it is downloaded there (5 GB, checksummed) if absent.
        **kwargs: Those of `ImageDataModule`.
    """

    num_classes = 101
    official_train_size = 75_750

    def __init__(self, root: str | Path = "data/food101", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        self.folder = self.root / "food-101"

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return [name.replace("_", " ") for name in datasets.Food101(str(self.root)).classes]

    def prepare_data(self) -> None:
        home = "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"
        download(datasets.Food101, self.root, self.folder, f"what is in food-101.tar.gz from {home}")

    def read_splits(self) -> dict[str, ImageSource]:
        splits = {"train": ["train"], "test": ["test"]}
        return read_official(datasets.Food101, self.root, self.folder, splits)
