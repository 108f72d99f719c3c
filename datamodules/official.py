"""Data sets whose files torchvision downloads, checks and lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from .images import ImageDataModule
from .pictures import PictureFiles, Pictures, check_there


class OfficialFiles(ImageDataModule):
    """Base of data modules on torchvision's classes for files; a subclass says which class, and what it needs.

    Args:
        root: Folder that holds the data set's own.
        **kwargs: Those of `ImageDataModule`.
    """

    official: ClassVar[Any]  # torchvision's class
    home: ClassVar[str]  # where its archives are
    archives: ClassVar[str]  # in words
    folder: ClassVar[str]  # of its own, below `root`
    images: ClassVar[str]  # the attribute with the files
    splits_of: ClassVar[dict[str, tuple[str, ...]]]  # ours -> torchvision's
    train_samples: ClassVar[int]

    def __init__(self, root: str | Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()

    @property
    def expected_samples(self) -> int:
        """Training pictures that will be there, before any file is."""
        if self.limit_per_class:
            return self.num_classes * self.limit_per_class
        kept = 1.0 if "val" in self.splits_of else 1 - self.val_share
        return round(self.train_samples * kept)

    def prepare_data(self) -> None:
        """Download what is not there."""
        try:
            self.official(str(self.root), download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{self.official.__name__} is not in {self.root} and cannot be downloaded ({error}). Put "
                f"{self.archives} from {self.home} into {self.root / self.folder}, or set data.root to where they are."
            ) from error

    def read_splits(self) -> dict[str, Pictures]:
        """The files that the lists name; all of them must be there."""
        splits: dict[str, Pictures] = {}
        for split, names in self.splits_of.items():
            parts = [self.official(str(self.root), split=name) for name in names]
            paths = [str(path) for part in parts for path in getattr(part, self.images)]
            check_there(paths, f"remove {self.root / self.folder}, and it is unpacked again")
            splits[split] = PictureFiles(paths, [label for part in parts for label in part._labels])
        return splits
