"""Oxford Flowers 102: 8,189 photographs of flowers that grow in the United Kingdom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchvision import datasets

from .files.official import download, read_official
from .images.base import ImageDataModule
from .images.sources import ImageSource


class Flowers102(ImageDataModule):
    """Oxford Flowers 102.

    Contents: 8,189 RGB photographs, the shorter side 500 pixels, 102 species, 40 to 258 of each.
    Folder: `<root>/flowers-102/` with `jpg/image_00001.jpg` and on, `imagelabels.mat` and `setid.mat`.
    Splits: the official 1,020 for training, 1,020 for validation, ten of each species; 6,149 for the test.
    Licence: none stated; for research. Source: Nilsback & Zisserman 2008,
    https://www.robots.ox.ac.uk/~vgg/data/flowers/102/

    Args:
        root: Folder that holds `flowers-102`; it is downloaded there (345 MB, checksummed) if absent.
        train_on_val: Whether to train on the validation images, too, as many papers do: 2,040 in all, of which
            `val_share` is held out.
        **kwargs: Those of `ImageDataModule`.
    """

    num_classes = 102

    def __init__(self, root: str | Path = "data/flowers102", train_on_val: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.train_on_val = Path(root).expanduser(), train_on_val
        self.folder = self.root / "flowers-102"

    @property
    def expected_samples(self) -> int:
        """Training images, known before any file is there."""
        return self.train_size_after_split(2_040 if self.train_on_val else 1_020, own_val=not self.train_on_val)

    @property
    def class_names(self) -> list[str]:
        return list(datasets.Flowers102.classes)

    def prepare_data(self) -> None:
        home = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
        archives = f"102flowers.tgz, imagelabels.mat and setid.mat from {home}"
        download(datasets.Flowers102, self.root, self.folder, archives)

    def read_splits(self) -> dict[str, ImageSource]:
        splits = {"train": ["train", "val"]} if self.train_on_val else {"train": ["train"], "val": ["val"]}
        splits["test"] = ["test"]
        return read_official(datasets.Flowers102, self.root, self.folder, splits)
