"""Oxford Flowers 102: 8,189 photographs of flowers that grow in the United Kingdom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchvision import datasets

from .official import OfficialFiles


class Flowers102(OfficialFiles):
    """Oxford Flowers 102.

    Contents: 8,189 RGB photographs, the shorter side 500 pixels, 102 species, 40 to 258 of each.
    Folder: `<root>/flowers-102/` with `jpg/image_00001.jpg` and on, `imagelabels.mat` and `setid.mat`.
    Splits: the official 1,020 for training, 1,020 for validation, ten of each species; 6,149 for the test.
    Licence: none stated; for research. Source: Nilsback & Zisserman 2008,
    https://www.robots.ox.ac.uk/~vgg/data/flowers/102/

    Args:
        root: Folder that holds `flowers-102`; it is downloaded there (345 MB, checksummed) if absent.
        train_on_val: Whether to train on the validation pictures, too, as many papers do: 2,040 in all, of which
            `val_share` is held out.
        **kwargs: Those of `ImageDataModule`.
    """

    official = datasets.Flowers102
    home = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    archives = "102flowers.tgz, imagelabels.mat and setid.mat"
    folder, images = "flowers-102", "_image_files"
    splits_of = {"train": ("train",), "val": ("val",), "test": ("test",)}
    train_samples = 1_020

    def __init__(self, root: str | Path = "data/flowers102", train_on_val: bool = False, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        if train_on_val:
            self.splits_of, self.train_samples = {"train": ("train", "val"), "test": ("test",)}, 2_040  # type: ignore[misc]

    @property
    def class_names(self) -> list[str]:
        """The species."""
        return list(datasets.Flowers102.classes)
