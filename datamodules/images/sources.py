"""Collections of labelled pictures that can be read one by one, and what to do with a broken one."""

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


class Pictures(Protocol):
    """A readable collection of labelled pictures."""

    labels: Tensor  # int64, (n,)

    def read(self, index: int) -> Image.Image:
        """Decode one picture; an unreadable one raises a ValueError that names it."""

    def name(self, index: int) -> str:
        """Where the picture comes from: a file's path, or a row."""

    def fingerprint(self) -> str:
        """Changes with the pictures."""


class PictureFiles:
    """Pictures in files.

    Args:
        paths: The files.
        labels: Their classes, `(n,)`.
        root: A folder that the paths begin at.
    """

    def __init__(self, paths: Sequence[str], labels: Sequence[int] | Tensor, root: str = "") -> None:
        self.paths, self.root = paths, root
        self.labels = torch.as_tensor(labels, dtype=torch.long)

    def read(self, index: int) -> Image.Image:
        """Decode one file."""
        return decode(self.name(index), self.name(index))

    def name(self, index: int) -> str:
        """The file's path."""
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


class PictureArray:
    """Pictures that are already decoded.

    Args:
        pixels: uint8, `(n, height, width, 3)`.
        labels: Classes, `(n,)`.
        source: Begins the name of each picture.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, source: str) -> None:
        self.pixels, self.labels, self.source = pixels, labels.long(), source

    def read(self, index: int) -> Image.Image:
        """One picture."""
        return Image.fromarray(self.pixels[index].numpy())

    def name(self, index: int) -> str:
        """The source and the row."""
        return f"{self.source}/{index}"

    def fingerprint(self) -> str:
        """Hash of the pixels."""
        return hashlib.sha256(self.pixels.numpy().data).hexdigest()


class Subset:
    """Some rows of a collection.

    Args:
        pictures: The collection.
        rows: int64, `(n,)`.
        labels: Classes of these rows, where they differ from the collection's.
    """

    def __init__(self, pictures: Pictures, rows: Tensor, labels: Tensor | None = None) -> None:
        self.pictures, self.rows = pictures, rows
        self.labels = pictures.labels[rows] if labels is None else labels

    def read(self, index: int) -> Image.Image:
        """One picture."""
        return self.pictures.read(int(self.rows[index]))

    def name(self, index: int) -> str:
        """Its name in the collection."""
        return self.pictures.name(int(self.rows[index]))

    def fingerprint(self) -> str:
        """The collection's."""
        return self.pictures.fingerprint()


def flattened(pictures: Pictures) -> tuple[Pictures, Tensor]:
    """The collection that subsets were cut from, and their rows in it, int64 `(n,)`."""
    chain = []
    while isinstance(pictures, Subset):
        chain.append(pictures.rows)
        pictures = pictures.pictures
    rows = chain.pop() if chain else torch.arange(len(pictures.labels))
    while chain:
        rows = rows[chain.pop()]
    return pictures, rows


def decode(file: Any, name: str) -> Image.Image:
    """Read a picture upright, in RGB and on white: see `decoding.read_rgb`.

    Args:
        file: A path or an open binary file.
        name: What to call it in an error.

    Raises:
        ValueError: The file is gone, truncated, no picture, or too large to be one. Whatever goes wrong in one file
            is that file's error: decoders raise a dozen kinds.
    """
    try:
        return read_rgb(file)
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"cannot read the picture {name}: {reason}. Repair or remove it, or set data.on_error to skip."
        ) from error


def check_labels(pictures: Pictures, class_names: list[str]) -> None:
    """Refuse labels out of range.

    Raises:
        ValueError: Names the first sample with one.
    """
    labels = pictures.labels
    wrong = ((labels < 0) | (labels >= len(class_names))).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"label {int(labels[wrong[0]])} of {pictures.name(wrong[0])} is out of range: "
            f"there are {len(class_names)} classes, 0 to {len(class_names) - 1} ({len(wrong)} such labels)"
        )


def check_there(paths: Sequence[str], advice: str) -> None:
    """See that all files of a data set are there; each folder is listed once.

    Raises:
        FileNotFoundError: Names the first that is missing, says how many are, and gives the advice.
    """
    folders = {Path(path).parent for path in paths}
    there = {entry.path for folder in folders if folder.is_dir() for entry in os.scandir(folder)}
    missing = [path for path in paths if path not in there]
    if missing:
        raise FileNotFoundError(f"{len(missing):,} of {len(paths):,} files are missing, first {missing[0]}: {advice}")


def existing_folder(path: str | Path, what: str) -> Path:
    """The folder as a `Path`.

    Raises:
        FileNotFoundError: It is not there; says what was expected in it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected {what}. Set data.root to where it is.")
    return folder
