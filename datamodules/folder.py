"""Any folder of images sorted into one folder per class."""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from .files.index import list_files, list_tree
from .images.base import ImageDataModule
from .images.decoding import readable_endings
from .images.sources import ImageFiles, ImageSource, Subset, existing_folder
from .sampling.splits import stratified_split

log = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "training", "train_set", "training_set"),
    "val": ("val", "valid", "validation", "val_set", "validation_set"),
    "test": ("test", "testing", "test_set"),
}


class ImageFolder(ImageDataModule):
    """Images in folders named by class; the ImageNet tree is one of these.

    Folder, either with splits or without:

        root/train/ants/a.jpg      root/ants/a.jpg
        root/val/bees/b.jpg        root/bees/b.jpg
        root/test/bees/c.jpg

    Splits: what chooses the checkpoint must not be what is reported. So with `train` and one of `val` and
    `test`, that one is the test and `val_share` of `train` is held out for validation; without any split,
    `test_share` and `val_share` are cut from every class. A log line says what was done.
    Files: all whose ending Pillow knows, but for drawings that other programs would be run for. What is omitted is
    counted in the log, by `recipes doctor` and in `omitted`.
    Licence and source: your own.

    Args:
        root: The folder.
        test_share: Part of the images kept for the test where there are no split folders.
        predict_root: Folder, searched through and through, or one image for `predict`; the test split if not given.
        class_names: Names of the classes where the folder need not be there: with `predict_root`, to predict. A
            recipe's CLI fills in the checkpoint's.
        **kwargs: Those of `ImageDataModule`.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        test_share: float = 0.2,
        predict_root: str | Path | None = None,
        class_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if class_names is not None and predict_root is None:
            raise ValueError("data.class_names are the folders' names, unless data.predict_root says what to predict")
        self.root, self.test_share, self.predict_root = root, test_share, predict_root
        self.given_names = class_names

    @cached_property
    def split_folders(self) -> dict[str, Path]:
        """Folder of each split that exists; only `train`, the root itself, where there are no split folders."""
        if self.root is None:
            raise ValueError("data.root is not set: give the folder that holds one folder of images per class")
        root = existing_folder(self.root, "one folder of images per class, or train/, val/ and test/ of such")
        folders = [Path(entry.path) for entry in os.scandir(root) if entry.is_dir()]
        found: dict[str, Path] = {}
        for split, names in SPLITS.items():
            several = sorted(folder for folder in folders if folder.name.lower() in names)
            if len(several) > 1:
                listed = " and ".join(f"{folder.name}/" for folder in several)
                raise ValueError(f"{root} has {listed}, each for {split}: keep one, or merge them")
            if several:
                found[split] = several[0]
        if "train" not in found:
            if found:
                raise ValueError(f"{root} has a folder {next(iter(found.values())).name}/ but none called train/")
            return {"train": root}
        if "val" in found and "test" not in found:
            log.info("%s has no test/: val/ is kept for the test, validation is cut from train/", root)
            found["test"] = found.pop("val")
        return found

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Those given, or the names of the class folders, sorted."""
        if self.given_names is not None:
            return self.given_names
        folder = self.split_folders["train"]
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        if len(names) < 2:
            raise ValueError(f"{folder} must hold a folder for each of two or more classes; found {names or 'none'}")
        return names

    def read_splits(self) -> dict[str, ImageSource]:
        """List the files; none is opened. With given class names only those to predict."""
        splits: dict[str, ImageSource] = {}
        if self.given_names is None:
            splits = {name: self._list(name, folder) for name, folder in self.split_folders.items()}
            self.note_beside_splits()
        if splits and "test" not in splits:
            whole = splits["train"]
            kept, held_out = stratified_split(whole.labels, self.test_share, seed=0)
            splits["train"], splits["test"] = Subset(whole, kept), Subset(whole, held_out)
        if self.predict_root is not None:
            root = Path(self.predict_root)
            if not root.exists():
                raise FileNotFoundError(f"no folder or image {root}: set data.predict_root to what to predict")
            folder, paths = root.parent, cast(Sequence[str], [root.name])
            if root.is_dir():
                folder, (paths, others) = root, list_tree(root, readable_endings())
                self.note_other_files(root, others)
            if not paths:
                raise FileNotFoundError(f"no image in {root}: expected .jpg, .png or others that Pillow reads")
            splits["predict"] = ImageFiles(paths, torch.zeros(len(paths)), str(folder))
        return splits

    def _list(self, split: str, folder: Path) -> ImageSource:
        strangers = {e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != "."} - set(self.class_names)
        if strangers:
            raise ValueError(f"{folder} has classes that the training folder lacks: {', '.join(sorted(strangers))}")
        paths, others = list_tree(folder, readable_endings())
        labels = torch.full((len(paths),), -1)
        for label, name in enumerate(self.class_names):  # paths are sorted: those of a class are neighbours
            labels[bisect_left(paths, f"{name}/") : bisect_left(paths, f"{name}0")] = label  # 0 is what follows /
        loose = (labels < 0).nonzero().flatten()
        if len(loose) == len(paths):
            beside = f"all {len(loose):,} lie in no class folder" if len(loose) else "it is empty"
            raise ValueError(
                f"no image for {split} in {folder}: {beside}. Sort them into one folder per class, or rename "
                "it; images without a class are for data.predict_root"
            )
        found = set(labels.tolist())
        empty = [name for label, name in enumerate(self.class_names) if label not in found]
        if empty and split == "train":
            raise ValueError(f"no image of class {empty[0]!r} in {folder / empty[0]}")
        self.note_other_files(folder, others)
        images = ImageFiles(paths, labels, str(folder))
        if not len(loose):
            return images
        self.omitted.append(f"images in {folder}, but in no class folder: {len(loose):,}, first {paths[int(loose[0])]}")
        return Subset(images, (labels >= 0).nonzero().flatten())

    def note_other_files(self, folder: Path, others: Mapping[str, int]) -> None:
        """Note the files of a folder that are not read, by their endings."""
        if others:
            endings = ", ".join(f"{count:,} {ending or 'without'}" for ending, count in others.items())
            self.omitted.append(f"files in {folder} without an image's ending: {sum(others.values()):,} ({endings})")

    def note_beside_splits(self) -> None:
        """Note what lies beside the folders of splits."""
        root = existing_folder(str(self.root), "the folders of splits")
        splits = set(self.split_folders.values())
        if root in splits:
            return
        endings, images, beside = readable_endings(), 0, []
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if entry.name[0] == "." or Path(entry.path) in splits:
                continue
            is_folder = entry.is_dir()
            images += len(list_files(entry.path, endings)) if is_folder else entry.name.lower().endswith(endings)
            beside.append(entry.name + "/" * is_folder)
        if beside:
            some = ", ".join(beside[:5]) + (" ..." if len(beside) > 5 else "")
            self.omitted.append(f"beside the splits of {root} lie {some}, with images: {images:,}")
