"""Oxford-IIIT Pet: 7,349 photographs of cats and dogs, with outlines."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision import datasets

from .files.official import download, read_official
from .images.several import Columns, SeveralTasks
from .images.sources import ImageSource
from .labels.tasks import Task

ANIMALS = ("cat", "dog")
BREEDS = [  # before the files are there
    "Abyssinian",
    "American Bulldog",
    "American Pit Bull Terrier",
    "Basset Hound",
    "Beagle",
    "Bengal",
    "Birman",
    "Bombay",
    "Boxer",
    "British Shorthair",
    "Chihuahua",
    "Egyptian Mau",
    "English Cocker Spaniel",
    "English Setter",
    "German Shorthaired",
    "Great Pyrenees",
    "Havanese",
    "Japanese Chin",
    "Keeshond",
    "Leonberger",
    "Maine Coon",
    "Miniature Pinscher",
    "Newfoundland",
    "Persian",
    "Pomeranian",
    "Pug",
    "Ragdoll",
    "Russian Blue",
    "Saint Bernard",
    "Samoyed",
    "Scottish Terrier",
    "Shiba Inu",
    "Siamese",
    "Sphynx",
    "Staffordshire Bull Terrier",
    "Wheaten Terrier",
    "Yorkshire Terrier",
]
PARTS = ("animal", "background", "outline")  # the trimap's 1, 2 and 3


class OxfordPets(SeveralTasks):
    """Oxford-IIIT Pet.

    Contents: 7,349 RGB photographs of various sizes, 25 breeds of dogs and 12 of cats, about 200 of each; for each
    image a map of what is animal (1), background (2) and outline (3). Tasks: `breed`; `animal`, cat or dog; with
    `trimaps` also `outline`, a mask whose classes begin at 0.
    Folder: `<root>/oxford-iiit-pet/` with `images/*.jpg`, `annotations/trainval.txt`, `annotations/test.txt` and
    `annotations/trimaps/*.png`.
    Splits: the official 3,669 for the test; `val_share` of the 3,680 others for validation.
    Licence: CC BY-SA 4.0. Source: Parkhi et al. 2012, https://www.robots.ox.ac.uk/~vgg/data/pets/

    Args:
        root: Folder that holds `oxford-iiit-pet`; it is downloaded there (811 MB, checksummed) if absent.
        trimaps: Whether the maps are read, as masks to learn.
        **kwargs: Those of `ImageDataModule`.
    """

    num_classes = 37
    official_train_size = 3_680

    def __init__(self, root: str | Path = "data/oxford_pets", trimaps: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trimaps = trimaps
        self.root = Path(root).expanduser()
        self.folder = self.root / "oxford-iiit-pet"

    @cached_property
    def names_found(self) -> list[str]:
        """The breeds as the files call them."""
        return list(datasets.OxfordIIITPet(str(self.root)).classes)

    @property
    def class_names(self) -> list[str]:
        return self.names_found if (self.folder / "annotations" / "trainval.txt").is_file() else BREEDS

    def prepare_data(self) -> None:
        home = "https://www.robots.ox.ac.uk/~vgg/data/pets/"
        download(datasets.OxfordIIITPet, self.root, self.folder, f"images.tar.gz and annotations.tar.gz from {home}")

    @property
    def tasks(self) -> dict[str, Task]:
        """What is learnt of an image; `recipes.vision` learns the breed alone."""
        found = {"breed": Task("classification", tuple(self.class_names)), "animal": Task("classification", ANIMALS)}
        return found | ({"outline": Task("segmentation", PARTS)} if self.trimaps else {})

    def read_splits(self) -> dict[str, ImageSource]:
        parts = {"train": "trainval", "test": "test"}
        splits = read_official(
            datasets.OxfordIIITPet, self.root, self.folder, {split: [name] for split, name in parts.items()}
        )
        for split, images in splits.items():
            animals = datasets.OxfordIIITPet(str(self.root), split=parts[split])._bin_labels
            columns = Columns({"breed": images.labels, "animal": torch.tensor(animals)})
            if self.trimaps:
                columns.masks["outline"] = partial(outline, images)
            images.columns = columns  # type: ignore[attr-defined]
        return splits

    def trimap(self, split: str, index: int) -> Image.Image:
        """What is animal (1), background (2) and outline (3) in an image of a split, of the image's size."""
        return trimap_of(self.splits[split].name(index))


def trimap_of(image: str) -> Image.Image:
    """The trimap of the image in a file."""
    path = Path(image)
    with Image.open(path.parents[1] / "annotations" / "trimaps" / f"{path.stem}.png") as trimap:
        return trimap.convert("L")


def outline(images: ImageSource, row: int) -> Image.Image:
    """A trimap with classes from 0."""
    try:
        return trimap_of(images.name(row)).point(lambda value: value - 1)
    except OSError as error:
        raise ValueError(f"cannot read the trimap of {images.name(row)}: {error}") from error
