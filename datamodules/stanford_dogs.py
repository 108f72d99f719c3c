"""Stanford Dogs: 20,580 photographs of 120 breeds."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from PIL import Image

from .files.archives import digest, download, unpack
from .images.base import ImageDataModule
from .images.sources import ImageFiles, ImageSource, check_files_exist

HOME = "http://vision.stanford.edu/aditya86/ImageNetDogs"
ARCHIVES = {  # name -> bytes, SHA-256
    "images.tar": (793_579_520, "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58"),
    "lists.tar": (481_280, "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c"),
    "annotation.tar": (21_852_160, "662ed36f707be6b195c2fda392d8e153e83af28cedc8e2134a649f198def30fd"),
}
LISTS = {"train": "train_list.mat", "test": "test_list.mat"}


class StanfordDogs(ImageDataModule):
    """Stanford Dogs.

    Contents: 20,580 RGB photographs of some 400 x 500 pixels, 120 breeds, 148 to 252 of each, with a box around each
    dog. They are of ImageNet's training set: weights trained on ImageNet have seen the test images.
    Folder: `<root>/Images/<breed>/*.jpg`, `<root>/lists/train_list.mat` and `test_list.mat` (or these in `<root>`
    itself), and for boxes `<root>/Annotation/<breed>/*`.
    Splits: the official 12,000 and 8,580; `val_share` of the 12,000 for validation.
    Licence: none stated; for research. Source: Khosla et al. 2011,
    http://vision.stanford.edu/aditya86/ImageNetDogs/

    Args:
        root: The folder. What is not there is unpacked from `images.tar`, `lists.tar` and `annotation.tar` in it, and
            these are downloaded (794 MB, checksummed) if absent.
        crop_to_box: Whether to cut every image to the box around its dogs.
        address: Where the archives are.
        **kwargs: Those of `ImageDataModule`.
    """

    num_classes = 120
    official_train_size = 12_000
    expected_archives = ARCHIVES

    def __init__(
        self, root: str | Path = "data/stanford_dogs", crop_to_box: bool = False, address: str = HOME, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.crop_to_box, self.address = Path(root).expanduser(), crop_to_box, address.rstrip("/")

    @property
    def list_folder(self) -> Path:
        """Where the lists are: in a folder of their own, or beside the images as other tools unpack them."""
        return self.root if (self.root / LISTS["train"]).is_file() else self.root / "lists"

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        files, labels = read_list(self.list_folder / LISTS["train"])
        folders = dict(zip(labels, (file.split("/")[0] for file in files), strict=True))
        missing = sorted(set(range(self.num_classes)) - set(folders))
        if missing:
            raise ValueError(f"{self.list_folder / LISTS['train']} has no image of class {missing[0] + 1}")
        return [folders[label].split("-", 1)[1].replace("_", " ") for label in range(self.num_classes)]

    def prepare_data(self) -> None:
        """Unpack and before it download what is not there."""
        parts = {"Images": "images.tar", "lists": "lists.tar"}
        if self.crop_to_box:
            parts["Annotation"] = "annotation.tar"
        if not self.lacking(parts):
            return
        from filelock import FileLock  # several runs on a fresh machine

        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / ".lock"):
            self.unpack_all(self.lacking(parts))

    def lacking(self, parts: dict[str, str]) -> dict[str, str]:
        """Folders that are not there, with their archives."""
        there = "lists" if self.list_folder == self.root else ""
        return {folder: name for folder, name in parts.items() if folder != there and not (self.root / folder).is_dir()}

    def unpack_all(self, parts: dict[str, str]) -> None:
        """Fetch archives that are not there, and unpack each into its folder."""
        for folder, name in parts.items():
            for cut_off in self.root.glob(f"{folder}.*.part"):  # what a run that was killed left
                shutil.rmtree(cut_off, ignore_errors=True)  # but not a download: that is a file
            archive = self.root / name
            size, sha256 = self.expected_archives[name]
            if not archive.is_file():
                download(f"{self.address}/{name}", archive, size, sha256)
            elif archive.stat().st_size != size or digest(archive) != sha256:
                raise ValueError(f"{archive} is not the archive of {HOME}: remove it, and it is downloaded")
            unpack(archive, self.root / folder, "." if folder == "lists" else folder)  # lists.tar has no folder

    def read_splits(self) -> dict[str, ImageSource]:
        """The images that the lists name; all of them must be there."""
        splits: dict[str, ImageSource] = {}
        lists = {split: read_list(self.list_folder / name) for split, name in LISTS.items()}
        for split, (files, labels) in lists.items():
            paths = [str(self.root / "Images" / file) for file in files]
            check_files_exist(paths, "remove the folder Images, and it is unpacked again")
            splits[split] = ImageFiles(paths, labels)
            if self.crop_to_box:
                boxes = [str(self.root / "Annotation" / file.removesuffix(".jpg")) for file in files]
                check_files_exist(boxes, "remove the folder Annotation, and it is unpacked again")
                splits[split] = BoxedFiles(paths, boxes, labels)
        return splits


class BoxedFiles(ImageFiles):
    """Images in files, cut to the boxes around what they show: for each an XML file as in PASCAL VOC."""

    def __init__(self, paths: list[str], boxes: list[str], labels: list[int]) -> None:
        super().__init__(paths, labels)
        self.boxes = boxes

    def fingerprint(self) -> str:
        return super().fingerprint() + ImageFiles(self.boxes, self.labels).fingerprint()

    def read(self, index: int) -> Image.Image:
        image = super().read(index)
        return image.crop(read_box(self.boxes[index], *image.size))


def read_box(file: str, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, upper, right and lower end in pixels of the smallest box around all boxes of a file; a ValueError where it
    cannot be read, or has no box inside the image.
    """
    try:
        found = [
            [int(float(str(box.findtext(key)))) for key in ("xmin", "ymin", "xmax", "ymax")]
            for box in ElementTree.parse(file).iter("bndbox")
        ]
        left, upper = (max(0, min(box[side] for box in found)) for side in (0, 1))
        right, lower = min(width, max(box[2] for box in found)), min(height, max(box[3] for box in found))
    except Exception as error:  # gone, no XML, an encoding that nobody knows, no number, no box
        raise ValueError(f"cannot read a box from {file}: {error}") from error
    if left >= right or upper >= lower:
        raise ValueError(f"the box of {file} lies outside its image of {width} x {height} pixels")
    return left, upper, right, lower


def read_list(file: Path) -> tuple[list[str], list[int]]:
    """Files, as `<breed>/<name>.jpg`, and labels from 0, of a MATLAB list; a ValueError where it is no such list."""
    from scipy.io import loadmat, matlab  # slow to import: only where it is used

    if not file.is_file():
        raise FileNotFoundError(f"no {file}: expected the list from lists.tar of {HOME}; set data.root to where it is")
    try:
        content = loadmat(file)
        files = [str(cell[0][0]) for cell in content["file_list"]]
        labels = (torch.from_numpy(content["labels"].astype("int64")).flatten() - 1).tolist()
    except (KeyError, IndexError, TypeError, ValueError, NotImplementedError, matlab.MatReadError) as error:
        raise ValueError(f"{file} is not a list of Stanford Dogs: {error!r}") from error
    if len(files) != len(labels):
        raise ValueError(f"{file} has {len(files)} files and {len(labels)} labels")
    return files, labels
