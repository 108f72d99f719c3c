"""Oxford-IIIT Pet: 7,349 photographs of cats and dogs, with outlines."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from .files.official import download, listed
from .images.base import ImageDataModule
from .images.sources import Pictures


class OxfordPets(ImageDataModule):
    """Oxford-IIIT Pet.

    Contents: 7,349 RGB photographs of various sizes, 25 breeds of dogs and 12 of cats, about 200 of each; for each
    picture a map of what is animal (1), background (2) and outline (3).
    Folder: `<root>/oxford-iiit-pet/` with `images/*.jpg`, `annotations/trainval.txt`, `annotations/test.txt` and
    `annotations/trimaps/*.png`.
    Splits: the official 3,669 for the test; `val_share` of the 3,680 others for validation.
    Licence: CC BY-SA 4.0. Source: Parkhi et al. 2012, https://www.robots.ox.ac.uk/~vgg/data/pets/

    Args:
        root: Folder that holds `oxford-iiit-pet`; it is downloaded there (811 MB, checksummed) if absent.
        **kwargs: Those of `ImageDataModule`.
    """

    num_classes = 37

    def __init__(self, root: str | Path = "data/oxford_pets", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        self.folder = self.root / "oxford-iiit-pet"

    @property
    def expected_samples(self) -> int:
        """Training pictures that will be there, before any file is."""
        return self.kept_of(3_680)

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The breeds."""
        return list(datasets.OxfordIIITPet(str(self.root)).classes)

    def prepare_data(self) -> None:
        """Download what is not there."""
        home = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
        download(datasets.OxfordIIITPet, self.root, self.folder, f"images.tar.gz and annotations.tar.gz from {home}")

    def read_splits(self) -> dict[str, Pictures]:
        """The files that the lists name."""
        splits = {"train": ["trainval"], "test": ["test"]}
        return {name: listed(datasets.OxfordIIITPet, self.root, self.folder, of) for name, of in splits.items()}

    def trimap(self, split: str, index: int) -> Image.Image:
        """What is animal (1), background (2) and outline (3) in a picture of a split, of the picture's size."""
        picture = Path(self.splits[split].name(index))
        with Image.open(picture.parents[1] / "annotations" / "trimaps" / f"{picture.stem}.png") as image:
            return image.convert("L")
