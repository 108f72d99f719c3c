"""Samples to try a model on: given ones, those of the run's validation split, or made-up ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.files.index import list_files
from datamodules.images.decoding import evaluation_crop, readable_endings
from datamodules.images.sources import decode

from .data import data_for
from .restored import Restored, Text

log = logging.getLogger(__name__)


def pixels(file: Any, name: str, size: int) -> Tensor:
    """An image as in evaluation, uint8 `(3, size, size)`.

    Args:
        file: A path or an open binary file.
        name: What to call it in an error.
        size: Side in pixels.

    Raises:
        ValueError: It cannot be read.
    """
    return torch.from_numpy(np.array(evaluation_crop(decode(file, name), size))).permute(2, 0, 1)


def samples_for(restored: Restored, given: Path | None, count: int) -> tuple[Any, str]:
    """Samples to compare two forms of a model on, and the words for where they are from.

    Those given come first; else the run's own validation split; else, and the words say so, made-up ones.

    Args:
        restored: The model.
        given: A folder of images, or a file with a text a line.
        count: How many at most.

    Returns:
        Images in [0, 1], `(n, 3, size, size)`, or a list of texts.

    Raises:
        ValueError: What is given cannot be read, or holds none.
    """
    vision = restored.reads == "vision"
    size = restored.image_size if vision else 0
    if given is not None:
        found = given_images(given, size, count) if vision else given_texts(given, count, restored.pairs)
        return found, f"from {given}"
    try:
        split = data_for(restored).splits["val"]
        rows = np.linspace(0, len(split.labels) - 1, min(count, len(split.labels))).round().astype(int).tolist()
        found = validation_images(split, rows, size) if vision else validation_texts(split, rows)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        found = random_images(count, size) if vision else random_texts(restored, count)
        return found, f"made up at random, for the validation samples are not at hand ({reason})"
    return found, "of the run's validation split"


def validation_images(split: Any, rows: Sequence[int], size: int) -> Tensor:
    """Some images of a split as in evaluation, without those that cannot be read."""
    found = []
    for row in rows:
        try:
            found.append(torch.from_numpy(np.array(evaluation_crop(split.read(row), size))).permute(2, 0, 1))
        except ValueError as error:
            log.warning("%s", error)
    return stacked(found, "the validation split")


def validation_texts(split: Any, rows: Sequence[int]) -> list[Text]:
    """Some texts of a split, or pairs of texts."""
    table = [split.table[split.row(row)] for row in rows]
    return [(row["text"], row["pair"]) if "pair" in row else row["text"] for row in table]


def given_images(folder: Path, size: int, count: int) -> Tensor:
    """Images of a folder and those below it, without those that cannot be read."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected one of images")
    found: list[Tensor] = []
    for path in list_files(folder, readable_endings()):
        try:
            found.append(pixels(folder / path, str(folder / path), size))
        except ValueError as error:
            log.warning("%s", error)
        if len(found) == count:
            break
    return stacked(found, str(folder))


def given_texts(file: Path, count: int, pairs: bool) -> list[Text]:
    """Texts of a file, one a line; of a pair both, with a tab between them."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    if not lines:
        raise ValueError(f"{file} holds no text: expected one a line")
    if not pairs:
        return list(lines)
    split = [line.partition("\t") for line in lines]
    alone = next((number for number, (_, tab, _) in enumerate(split, 1) if not tab), None)
    if alone:
        raise ValueError(f"{file}, line {alone}: expected two texts with a tab between them")
    return [(first, second) for first, _, second in split]


def stacked(images: Sequence[Tensor], where: str) -> Tensor:
    """uint8 images as one batch in [0, 1]."""
    if not images:
        raise ValueError(f"{where} holds no image that can be read")
    return torch.stack(list(images)).float() / 255


def random_images(count: int, size: int) -> Tensor:
    """Smooth ones, as photographs are."""
    small = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")


def random_texts(restored: Restored, count: int) -> list[Text]:
    """Of random tokens, up to the longest that the model takes."""
    generator = np.random.default_rng(0)
    most = max(1, restored.max_length - 4)  # with room for the special ones

    def text(length: int) -> str:
        return str(restored.tokenizer.decode(generator.integers(0, len(restored.tokenizer), length).tolist()))

    lengths = np.linspace(1, most, count).astype(int).tolist()
    make: Callable[[int], Text] = (lambda n: (text(n // 2), text(n // 2))) if restored.pairs else text
    return [make(length) for length in lengths]
