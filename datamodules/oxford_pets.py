"""Oxford-IIIT Pet: 7,349 photographs of cats and dogs, with outlines."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from .official import OfficialFiles


class OxfordPets(OfficialFiles):
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
    official = datasets.OxfordIIITPet
    home = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
    archives = "images.tar.gz and annotations.tar.gz"
    folder, images = "oxford-iiit-pet", "_images"
    splits_of = {"train": ("trainval",), "test": ("test",)}
    train_samples = 3_680

    def __init__(self, root: str | Path = "data/oxford_pets", **kwargs: Any) -> None:
        super().__init__(root, **kwargs)

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The breeds."""
        return list(datasets.OxfordIIITPet(str(self.root)).classes)

    def trimap(self, split: str, index: int) -> Image.Image:
        """What is animal (1), background (2) and outline (3) in a picture of a split, of the picture's size."""
        picture = Path(self.splits[split].name(index))
        with Image.open(picture.parents[1] / "annotations" / "trimaps" / f"{picture.stem}.png") as image:
            return image.convert("L")
