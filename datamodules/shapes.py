"""Rendered geometric shapes, each with its class, size, colours and outline: several tasks, no download, no files."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from .images.several import Columns, SeveralTasks
from .images.sources import ImageArray, ImageSource, Subset
from .labels.tasks import Task
from .sampling.splits import stratified_split

KINDS = {  # name -> arms, and how far the boundary goes in between them
    "triangle": (3, math.cos(math.pi / 3)),
    "square": (4, math.cos(math.pi / 4)),
    "pentagon": (5, math.cos(math.pi / 5)),
    "circle": (60, math.cos(math.pi / 60)),
    "cross": (4, 0.35),
    "star": (5, 0.45),
}
COLOURS = ("red", "green", "blue")
TEST_SHARE, TEST_SEED = 0.25, 0
CHUNK = 250  # images rendered at once: 50 MB


class Shapes(SeveralTasks):
    """One shape on a noisy background, turned, moved and coloured by chance.

    Contents: RGB images, the same on every machine, as many of each of six shapes. Tasks: `shape`, its class; `size`,
    its diameter as a share of the image's side; `colours`, which of red, green and blue are in it;
    `outline`, a mask of background and shape.
    Splits: a quarter for the test, stratified, the same whatever the seed; `val_share` of the rest for validation.
    Licence: none needed. Source: this file.

    Args:
        images: How many, all splits together.
        side: Of an image in pixels.
        sizes: The smallest and the largest, above 0 and below 1.
        noise: Standard deviation of the noise on every pixel and channel, 0 to 1.
        known: Task -> share of the training samples whose label is told; all if not given. Of the others it is missing.
        **kwargs: Those of `ImageDataModule`. A mirrored shape keeps its labels; a random crop would change its size, so
            `standard` and `strong` augmentation take images in memory, which they shift.
    """

    def __init__(
        self,
        images: int = 4000,
        side: int = 64,
        sizes: tuple[float, float] = (0.2, 0.7),
        noise: float = 0.15,
        known: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if images < 4 * len(KINDS) or side < 16:
            raise ValueError(f"data.images must be at least {4 * len(KINDS)}, data.side 16; not {images} and {side}")
        unknown = set(known or {}) - set(self.tasks)
        if unknown:
            raise ValueError(f"data.known: there is no task {min(unknown)!r}; there are {', '.join(self.tasks)}")
        if not 0 < sizes[0] < sizes[1] < 1:
            raise ValueError(f"data.sizes must be two numbers between 0 and 1, the smaller first; not {list(sizes)}")
        self.images, self.side, self.sizes, self.noise, self.known = images, side, sizes, noise, known or {}

    @property
    def class_names(self) -> list[str]:
        return list(KINDS)

    @property
    def tasks(self) -> dict[str, Task]:
        return {
            "shape": Task("classification", tuple(KINDS)),
            "size": Task("regression"),
            "colours": Task("multi_label", COLOURS),
            "outline": Task("segmentation", ("background", "shape")),
        }

    @property
    def expected_samples(self) -> int:
        return self.train_size_after_split(round(self.images * (1 - TEST_SHARE)))

    @cached_property
    def rendered(self) -> ImageArray:
        """All images, with their labels."""
        pixels, inside, values = render(self.images, self.side, self.sizes, self.noise)
        labels = {name: torch.from_numpy(column) for name, column in values.items()}
        whole = ImageArray(torch.from_numpy(pixels), labels["shape"], "shapes")
        masks = torch.from_numpy(inside)
        masked = torch.ones(self.images, dtype=torch.bool)
        train = stratified_split(whole.labels, TEST_SHARE, TEST_SEED)[0]
        for number, name in enumerate(self.tasks):
            order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(number))]
            hidden = order[round(self.known.get(name, 1) * len(train)) :]
            if name == "outline":
                masked[hidden] = False
            else:
                labels[name] = labels[name].clone()
                labels[name][hidden] = math.nan if labels[name].is_floating_point() else -100

        def mask(row: int) -> Image.Image | None:
            return Image.fromarray(masks[row].numpy()) if masked[row] else None

        whole.columns = Columns(labels, {"outline": mask}, {"outline": masked})  # type: ignore[attr-defined]
        return whole

    def read_splits(self) -> dict[str, ImageSource]:
        whole = self.rendered
        kept, held_out = stratified_split(whole.labels, TEST_SHARE, TEST_SEED)
        return {"train": Subset(whole, kept), "test": Subset(whole, held_out)}


def render(
    count: int, side: int, sizes: tuple[float, float], noise: float
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
    """Images uint8 `(n, side, side, 3)`, masks uint8 `(n, side, side)` of 0 and 1, and labels by task."""
    rng = np.random.Generator(np.random.Philox(0))
    kind = np.arange(count) % len(KINDS)
    size = rng.uniform(*sizes, count).astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi, count)
    middle = size[:, None] / 2 + rng.uniform(0, 1, (count, 2)) * (1 - size[:, None])
    mixtures = np.array([[number >> bit & 1 for bit in range(3)] for number in range(1, 8)], np.float32)
    has = mixtures[rng.integers(0, len(mixtures), count)]
    colour = has * rng.uniform(0.55, 1.0, (count, 3)) + (1 - has) * rng.uniform(0, 0.35, (count, 3))
    ground = rng.uniform(0.1, 0.9, (count, 3))
    slope = rng.uniform(-0.2, 0.2, (count, 2))
    arms, waist = (np.array(column)[kind] for column in zip(*KINDS.values(), strict=True))
    place = (np.arange(side) + 0.5) / side
    pixels, inside = np.empty((count, side, side, 3), np.uint8), np.empty((count, side, side), np.uint8)
    for start in range(0, count, CHUNK):
        some = slice(start, start + CHUNK)
        y, x = place[None, :, None] - middle[some, 1, None, None], place[None, None, :] - middle[some, 0, None, None]
        edge = boundary(np.arctan2(y, x) + turn[some, None, None], arms[some, None, None], waist[some, None, None])
        depth = edge * size[some, None, None] / 2 - np.hypot(x, y)  # of a pixel inside the shape
        share = np.clip(depth * side + 0.5, 0, 1)[..., None]
        light = (slope[some, :1, None] * y + slope[some, 1:, None] * x)[..., None]
        image = share * colour[some, None, None] + (1 - share) * (ground[some, None, None] + light)
        image += noise * rng.standard_normal(image.shape, np.float32)
        pixels[some] = np.clip(image * 255, 0, 255).round()
        inside[some] = depth > 0
    return pixels, inside, {"shape": kind, "size": size, "colours": has}


def boundary(angle: npt.NDArray[Any], arms: npt.NDArray[Any], waist: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """How far a shape goes in a direction: 1 at its arms, `waist` midway between them, straight in between."""
    half = np.pi / arms
    angle = np.abs((angle + half) % (2 * half) - half)  # from the nearest arm, up to half
    across, along = 1 - waist * np.cos(half), waist * np.sin(half)
    found: npt.NDArray[Any] = along / (np.sin(angle) * across + np.cos(angle) * along)
    return found
