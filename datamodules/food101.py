"""Food-101: 101,000 photographs of dishes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torchvision import datasets

from .images import ImageDataModule
from .pictures import PictureFiles, Pictures, check_there


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

    def __init__(self, root: str | Path = "data/food101", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()

    @property
    def expected_samples(self) -> int:
        """Training pictures that will be there, before any file is."""
        return 101 * self.limit_per_class if self.limit_per_class else round(75_750 * (1 - self.val_share))

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The dishes."""
        return [name.replace("_", " ") for name in datasets.Food101(str(self.root)).classes]

    def prepare_data(self) -> None:
        """Download what is not there."""
        try:
            datasets.Food101(str(self.root), download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"Food-101 is not in {self.root} and cannot be downloaded ({error}). Unpack food-101.tar.gz from "
                f"https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/ in {self.root}, or set data.root to "
                "where it is."
            ) from error

    def read_splits(self) -> dict[str, Pictures]:
        """The files that the lists name; all of them must be there."""
        splits: dict[str, Pictures] = {}
        for split in ("train", "test"):
            food = datasets.Food101(str(self.root), split=split)
            paths = [str(path) for path in food._image_files]
            check_there(paths, f"remove {self.root / 'food-101'}, and it is unpacked again")
            splits[split] = PictureFiles(paths, food._labels)
        return splits
