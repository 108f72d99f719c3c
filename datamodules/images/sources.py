"""Collections of labelled images that can be read one by one, and what to do with a broken one."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from .decoding import read_rgb


class ImageSource(Protocol):
    """A readable collection of labelled images."""

    labels: Tensor  # int64, (n,)

    def read(self, index: int) -> Image.Image:
        """Decode one image; an unreadable one raises a ValueError that names it."""

    def name(self, index: int) -> str:
        """Where the image comes from: a file's path, or a row."""

    def fingerprint(self) -> str:
        """Changes with the images."""


class ImageFiles:
    """Images in files, whose paths may begin at a root; labels `(n,)`."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int] | Tensor, root: str = "") -> None:
        self.paths, self.root = paths, root
        self.labels = torch.as_tensor(labels, dtype=torch.long)

    def read(self, index: int) -> Image.Image:
        return decode(self.name(index), self.name(index))

    def name(self, index: int) -> str:
        return f"{self.root}/{self.paths[index]}" if self.root else self.paths[index]

    def fingerprint(self) -> str:
        """Hash of names, sizes and times of change; no file is read, and one that is gone counts by its name."""
        digest = hashlib.sha256()
        for index in range(len(self.paths)):
            path = self.name(index)
            digest.update(os.fsencode(path))
            with contextlib.suppress(OSError):
                status = os.stat(path)
                digest.update(f" {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()


class ImageArray:
    """Decoded images, uint8 `(n, height, width, 3)`; labels `(n,)`; their names begin with `source`."""

    def __init__(self, pixels: Tensor, labels: Tensor, source: str) -> None:
        self.pixels, self.labels, self.source = pixels, labels.long(), source

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index].numpy())

    def name(self, index: int) -> str:
        return f"{self.source}/{index}"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.pixels.numpy().data).hexdigest()


class Subset:
    """Some rows of a collection, int64 `(n,)`; with labels of their own where these differ from the collection's."""

    def __init__(self, images: ImageSource, rows: Tensor, labels: Tensor | None = None) -> None:
        self.images, self.rows = images, rows
        self.labels = images.labels[rows] if labels is None else labels

    def read(self, index: int) -> Image.Image:
        return self.images.read(int(self.rows[index]))

    def name(self, index: int) -> str:
        return self.images.name(int(self.rows[index]))

    def fingerprint(self) -> str:
        return self.images.fingerprint()


def flattened(images: ImageSource) -> tuple[ImageSource, Tensor]:
    """The collection that subsets were cut from, and their rows in it, int64 `(n,)`."""
    if not isinstance(images, Subset):
        return images, torch.arange(len(images.labels))
    source, rows = flattened(images.images)
    return source, rows[images.rows]


def decode(file: Any, name: str) -> Image.Image:
    """Read an image upright, in RGB and on white, from a path or an open file: see `decoding.read_rgb`.

    Raises:
        ValueError: The file is gone, truncated, no image, or too large to be one. Whatever goes wrong in one file
            is that file's error: decoders raise a dozen kinds.
    """
    try:
        return read_rgb(file)
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"cannot read the image {name}: {reason}. Repair or remove it, or set data.on_error to skip."
        ) from error


def check_labels(images: ImageSource, class_names: list[str]) -> None:
    """Refuse labels out of range with a ValueError that names the first sample with one."""
    labels = images.labels
    wrong = ((labels < 0) | (labels >= len(class_names))).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"label {int(labels[wrong[0]])} of {images.name(wrong[0])} is out of range: "
            f"there are {len(class_names)} classes, 0 to {len(class_names) - 1} ({len(wrong)} such labels)"
        )


def check_files_exist(paths: Sequence[str], advice: str) -> None:
    """Check that all files of a data set exist, listing each folder once; a FileNotFoundError gives the advice."""
    folders = {Path(path).parent for path in paths}
    here = Path()
    existing = {
        entry.name if folder == here else entry.path
        for folder in folders
        if folder.is_dir()
        for entry in os.scandir(folder)
    }
    missing = [path for path in paths if path not in existing]
    if missing:
        raise FileNotFoundError(f"{len(missing):,} of {len(paths):,} files are missing, first {missing[0]}: {advice}")


def existing_folder(path: str | Path, what: str) -> Path:
    """The folder as a `Path`; a FileNotFoundError says what was expected in it."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected {what}. Set data.root to where it is.")
    return folder
