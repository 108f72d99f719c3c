"""Oxford-IIIT Pet: 7,349 photographs of cats and dogs, with outlines."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from .files.official import download, read_official
from .images.base import ImageDataModule
from .images.sources import ImageSource


class OxfordPets(ImageDataModule):
    """Oxford-IIIT Pet.

    Contents: 7,349 RGB photographs of various sizes, 25 breeds of dogs and 12 of cats, about 200 of each; for each
    image a map of what is animal (1), background (2) and outline (3).
    Folder: `<root>/oxford-iiit-pet/` with `images/*.jpg`, `annotations/trainval.txt`, `annotations/test.txt` and
    `annotations/trimaps/*.png`.
    Splits: the official 3,669 for the test; `val_share` of the 3,680 others for validation.
    Licence: CC BY-SA 4.0. Source: Parkhi et al. 2012, https://www.robots.ox.ac.uk/~vgg/data/pets/

    Args:
        root: Folder that holds `oxford-iiit-pet`; it is downloaded there (811 MB, checksummed) if absent.
        **kwargs: Those of `ImageDataModule`.
    """

    num_classes = 37
    official_train_size = 3_680

    def __init__(self, root: str | Path = "data/oxford_pets", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        self.folder = self.root / "oxford-iiit-pet"

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return list(datasets.OxfordIIITPet(str(self.root)).classes)

    def prepare_data(self) -> None:
        home = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
        download(datasets.OxfordIIITPet, self.root, self.folder, f"images.tar.gz and annotations.tar.gz from {home}")

    def read_splits(self) -> dict[str, ImageSource]:
        splits = {"train": ["trainval"], "test": ["test"]}
        return read_official(datasets.OxfordIIITPet, self.root, self.folder, splits)

    def trimap(self, split: str, index: int) -> Image.Image:
        """What is animal (1), background (2) and outline (3) in an image of a split, of the image's size."""
        path = Path(self.splits[split].name(index))
        with Image.open(path.parents[1] / "annotations" / "trimaps" / f"{path.stem}.png") as trimap:
            return trimap.convert("L")
